"""The best and the worst sample of each user become a preference pair; users without a pair are counted by reason.

Validation users get pairs too: they are never trained on and measure the accuracy of DPO.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.ranking import PairSection
from dpo4rec_ray.core.pairing import PAIRINGS, Drop, worst_samples
from dpo4rec_ray.core.rewards import list_noise, shrink
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.store.schemas import SCHEMAS

_ORDER = [("user_id", "ascending"), ("sample_id", "ascending")]


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `pairs` of the round, part by part: all samples of a user are in one part."""
    store.start("pairs", round_id)
    splits = store.read("users", split=("train", "valid"), columns=["user_id", "split"])
    split_of = dict(zip(splits["user_id"].to_pylist(), splits["split"].to_pylist(), strict=True))
    shrunk = _shrunk_rewards(store, round_id) if config.pair.shrinkage else None
    kept = Counter[str]()
    dropped = {"train": Counter[str](), "valid": Counter[str]()}
    rows_in = 0
    files = zip(store.files("generations", round_id), store.files("scores", round_id), strict=True)
    for part, (generation_file, score_file) in enumerate(files):
        samples, scores = (pq.read_table(file).sort_by(_ORDER) for file in (generation_file, score_file))
        if not samples["user_id"].equals(scores["user_id"]):
            raise ValueError(f"{score_file} and {generation_file} hold different users")
        rows_in += len(samples)
        rows: list[dict[str, Any]] = []
        rewards = scores["reward"].to_numpy()
        users, starts, counts = np.unique(
            samples["user_id"].to_numpy(), return_index=True, return_counts=True
        )
        for user, start, count in zip(users.tolist(), starts.tolist(), counts.tolist(), strict=True):
            own = rewards[start : start + count] if shrunk is None else shrunk[user]
            pair = _pair(config.pair, samples.slice(start, count), own)
            split = split_of[user]
            if isinstance(pair, Drop):
                dropped[split][pair.value] += 1
            else:
                kept[split] += 1
                rows.append({"round": round_id, "user_id": user, "split": split, **pair})
        store.write("pairs", pa.Table.from_pylist(rows, SCHEMAS["pairs"]), round_id, part)
    reasons = dict(dropped["train"])
    if not kept["train"]:
        raise UserError(
            f"round {round_id}: no training user gave a pair ({reasons}); "
            'use reward.metric = "log_likelihood", more reward.num_redraws, or a lower pair.min_margin'
        )
    say(f"  pairs: {kept['train']} training, {kept['valid']} held out; dropped {reasons or 'none'}")
    failed = store.failed("generations", round_id)
    for user, reason in zip(failed["subject_id"].to_pylist(), failed["reason"].to_pylist(), strict=True):
        dropped[split_of[user]][reason] += 1
    stats = {
        "pairs": kept["train"],
        "heldout_pairs": kept["valid"],
        "dropped": dict(dropped["train"]),
        "dropped_heldout": dict(dropped["valid"]),
    }
    return Outcome(rows_in=rows_in, rows_out=kept.total(), stats=stats)


def _pair(section: PairSection, samples: pa.Table, rewards: np.ndarray) -> dict[str, Any] | Drop:
    """The texts and rewards of one user's pair. samples: [N] rows; rewards: [N]."""
    completions = samples["token_ids"].to_pylist()
    # Samples without token ids (llm.source is not "vllm") are compared by their texts.
    compared = completions if any(completions) else samples["text"].to_pylist()
    found = PAIRINGS[section.rule](rewards, compared, section.min_margin)
    if isinstance(found, Drop):
        return found
    chosen, _ = found
    rejected = worst_samples(rewards, compared, found, section.num_rejected, section.min_margin)
    return {
        "prompt_token_ids": samples["prompt_token_ids"][0].as_py(),
        "chosen_token_ids": completions[chosen],
        "rejected_token_ids": [completions[one] for one in rejected],
        "chosen_reward": float(rewards[chosen]),
        "rejected_reward": [float(rewards[one]) for one in rejected],
    }


def _shrunk_rewards(store: RunDir, round_id: int) -> dict[int, np.ndarray]:
    """Each user's rewards in sample order, pulled towards the user's mean. How far they are pulled depends on all users."""
    table = store.read("scores", round_id).sort_by(_ORDER)
    users, starts = np.unique(table["user_id"].to_numpy(), return_index=True)
    rewards = table["reward"].to_numpy().reshape(len(users), -1)  # every user has N samples
    num_lists = table["num_lists"].to_numpy()[starts]
    noise = list_noise(table["std_error"].to_numpy()[starts], num_lists)
    with np.errstate(divide="ignore"):  # a user without lists has no reward either
        shrunk, factors = shrink(rewards, noise / np.sqrt(num_lists))
    if not np.nansum(factors):
        raise UserError(
            f"round {round_id}: the rewards differ no more than luck alone explains, so shrinkage leaves no pair; use "
            'reward.metric = "log_likelihood", more reward.num_redraws or more users, or set pair.shrinkage = false'
        )
    say(f"  shrinkage: rewards keep {np.nanmean(factors):.0%} of their distance from the user's mean")
    return dict(zip(users.tolist(), shrunk, strict=True))
