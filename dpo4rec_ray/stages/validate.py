"""Did the round help? Reward of fresh samples of the validation users, before (policy r-1) and after (policy r).

Both are means over all N samples of a user, without any selection. Test users are not used. Rounds stop when this reward
no longer improves, and the best round is the one that is served.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
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
    before = store.read("scores", round_id, columns=["user_id", "plain_reward"])
    before = before.filter(pc.is_in(before["user_id"], valid))
    texts = store.read("knowledge", round_id)
    texts = texts.filter(pc.and_(pc.equal(texts["subject"], "user"), pc.is_in(texts["subject_id"], valid)))
    user_ids = texts["subject_id"].to_numpy()
    found = sample_scorer(config, store, [config.reward.metric]).rewards(
        user_ids, vectors_of(texts["vector"])
    )
    means = {
        "before": _mean_per_user(
            before["user_id"].to_numpy(), before["plain_reward"].to_numpy().astype(np.float64)
        ),
        "after": _mean_per_user(user_ids, found.reward[:, 0]),
    }
    both = pd.concat(means, axis=1, join="inner").sort_index()
    users, reward_before, reward_after = both.index.to_numpy(), *both.to_numpy().T
    if not len(users):
        raise UserError(
            "no validation user has a reward both before and after; raise data.valid_frac, or see which users "
            "generate could not sample (the manifest of generations counts them)"
        )
    delta = paired_bootstrap(reward_after - reward_before, users)
    table = pa.table(
        {
            "round": np.full(len(users), round_id, np.int32),
            "user_id": users,
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


def _mean_per_user(user_ids: np.ndarray, rewards: np.ndarray) -> pd.Series:
    """Mean reward over each user's samples. Users whose lists have no positive have no reward and are left out."""
    means = pd.Series(rewards).groupby(user_ids).agg(lambda own: own.to_numpy().mean())
    return means[np.isfinite(means)]


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
        per_user = pd.Series(texts.to_pylist()).groupby(ids.to_numpy(), sort=False).agg(list)
        stats[f"distinct_texts_{name}"] = float(np.mean([len(set(own)) / len(own) for own in per_user]))
        if tastes:
            accuracy, chance = text_accuracy(per_user.tolist(), [tastes[user] for user in per_user.index])
            stats |= {f"text_accuracy_{name}": accuracy, f"text_chance_{name}": chance}
    return stats


def rounds_have_peaked(store: RunDir, round_id: int, patience: int) -> bool:
    """Whether the last `patience` rounds brought no better held-out reward than the best one before them."""
    if any(store.manifest("heldout", one) is None for one in range(1, round_id + 1)):
        return False
    rewards = _heldout_rewards(store, round_id)
    return round_id >= patience and max(rewards[-patience:]) <= max(rewards[:-patience])


def best_round(store: RunDir, last_round: int) -> int:
    """The round with the highest held-out reward; 0 when no round improved on the base LLM."""
    rewards = _heldout_rewards(store, last_round)
    return rewards.index(max(rewards))


def _heldout_rewards(store: RunDir, last_round: int) -> list[float]:
    """Of the base LLM (-inf without a round) and of each round's policy."""
    stats = [store.require("heldout", round_id).stats for round_id in range(1, last_round + 1)]
    before = stats[0]["heldout_reward_before"] if stats else float("-inf")
    return [before, *(one["heldout_reward_after"] for one in stats)]
