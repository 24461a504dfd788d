"""Did the round help? Reward of fresh samples of the validation users, before (policy r-1) and after (policy r).

Both are means over all N samples of a user, without any selection. Test users are not used. Rounds stop when this reward
no longer improves, and the best round is the one that is served.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.intervals import paired_bootstrap
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.teacher import text_accuracy
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.store.reading import sample_scorer, vectors_of
from dpo4rec_ray.workers.tasks import in_worker


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `heldout` of the round."""
    store.start("heldout", round_id)
    table, stats = in_worker(_measure, config, store, round_id, gpus=config.reward.gpus_per_worker)
    store.write("heldout", table, round_id)
    low, high = stats["heldout_reward_delta_ci95"]
    say(
        f"  held-out reward: {stats['heldout_reward_before']:.4f} -> {stats['heldout_reward_after']:.4f}, "
        f"difference {stats['heldout_reward_delta']:+.4f} [{low:+.4f}, {high:+.4f}] over {len(table)} users"
    )
    return Outcome(rows_in=stats["samples"], rows_out=len(table), stats=stats)


def _measure(config: Config, store: RunDir, round_id: int) -> tuple[pa.Table, dict[str, Any]]:
    valid_users = store.read("users", split="valid", columns=["user_id"])["user_id"].to_numpy()
    # Users without all their texts have no reward before (generate leaves them out), so they get none after either.
    failed = store.failed("knowledge", round_id)["subject_id"].to_numpy()  # after round 0 there are no items
    valid = pa.array(np.setdiff1d(valid_users, failed))
    before = store.read("scores", round_id, columns=["user_id", "reward"])
    before = before.filter(pc.is_in(before["user_id"], valid))
    texts = store.read("knowledge", round_id)
    texts = texts.filter(pc.and_(pc.equal(texts["subject"], "user"), pc.is_in(texts["subject_id"], valid)))
    user_ids = texts["subject_id"].to_numpy()
    found = sample_scorer(config, store, [config.reward.metric]).rewards(
        user_ids, vectors_of(texts["vector"])
    )
    means = [
        _mean_per_user(before["user_id"].to_numpy(), before["reward"].to_numpy().astype(np.float64)),
        _mean_per_user(user_ids, found.reward[:, 0]),
    ]
    users = sorted(means[0].keys() & means[1].keys())
    if not users:
        raise UserError(
            "no validation user has a reward both before and after; raise data.valid_frac, or see which users "
            "generate could not sample (the manifest of generations counts them)"
        )
    reward_before, reward_after = (np.array([mean[user] for user in users]) for mean in means)
    delta = paired_bootstrap(reward_after - reward_before, np.array(users))
    table = pa.table(
        {
            "round": np.full(len(users), round_id, np.int32),
            "user_id": np.array(users),
            "reward_before": reward_before.astype(np.float32),
            "reward_after": reward_after.astype(np.float32),
        }
    )
    stats = {
        "heldout_reward_before": float(reward_before.mean()),
        "heldout_reward_after": float(reward_after.mean()),
        "heldout_reward_delta": delta.mean,
        "heldout_reward_delta_ci95": [delta.low, delta.high],
        "samples": len(before) + len(texts),
        **_text_stats(store, round_id, valid, texts),
    }
    return table, stats


def _mean_per_user(user_ids: np.ndarray, rewards: np.ndarray) -> dict[int, float]:
    """User -> mean reward over its samples. Users whose lists have no positive have no reward and are left out."""
    order = np.argsort(user_ids, kind="stable")
    users, starts = np.unique(user_ids[order], return_index=True)
    samples = zip(users.tolist(), np.split(rewards[order], starts[1:]), strict=True)
    return {user: float(own.mean()) for user, own in samples if np.isfinite(own).all()}


def _text_stats(store: RunDir, round_id: int, valid: pa.Array, after: pa.Table) -> dict[str, float]:
    """Distinct texts per sample before and after, which fall first where the LLM collapses to one text.

    In the sample world, where the true tastes of users are known, also the share of named tastes that are true, and what
    chance alone would give.
    """
    before = store.read("generations", round_id, columns=["user_id", "text"])
    before = before.filter(pc.is_in(before["user_id"], valid))
    truth = store.read("truth")
    tastes = dict(zip(truth["user_id"].to_pylist(), truth["tastes"].to_pylist(), strict=True))
    stats: dict[str, float] = {}
    for name, ids, texts in (
        ("before", before["user_id"], before["text"]),
        ("after", after["subject_id"], after["text"]),
    ):
        per_user: dict[int, list[str]] = {}
        for user, text in zip(ids.to_pylist(), texts.to_pylist(), strict=True):
            per_user.setdefault(user, []).append(text)
        stats[f"distinct_texts_{name}"] = float(
            np.mean([len(set(own)) / len(own) for own in per_user.values()])
        )
        if tastes:
            accuracy, chance = text_accuracy(list(per_user.values()), [tastes[user] for user in per_user])
            stats |= {f"text_accuracy_{name}": accuracy, f"text_chance_{name}": chance}
    return stats


def rounds_have_peaked(store: RunDir, round_id: int, patience: int) -> bool:
    """Whether the last `patience` rounds brought no better held-out reward than the best one before them."""
    manifests = [store.manifest("heldout", r) for r in range(1, round_id + 1)]
    rewards = [manifest.stats["heldout_reward_after"] for manifest in manifests if manifest is not None]
    first = store.manifest("heldout", 1)
    if first is None or len(rewards) < patience:
        return False
    rewards = [first.stats["heldout_reward_before"], *rewards]
    return max(rewards[-patience:]) <= max(rewards[:-patience])


def best_round(store: RunDir, last_round: int) -> int:
    """The round with the highest held-out reward; 0 when no round improved on the base LLM."""
    best, best_reward = 0, -np.inf
    for round_id in range(1, last_round + 1):
        stats = store.require("heldout", round_id).stats
        if round_id == 1:
            best_reward = stats["heldout_reward_before"]
        if stats["heldout_reward_after"] > best_reward:
            best, best_reward = round_id, stats["heldout_reward_after"]
    return best
