"""The best and the worst sample of each user become a preference pair; what gives no pair is counted by reason.

Validation users get pairs too: they are never trained on and measure the accuracy of DPO.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.pairing import PAIRINGS, Drop, worst_samples
from dpo4rec_ray.core.rewards import list_noise, shrink
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import say


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `pairs` of the round, part by part: a user's samples are all in one part."""
    store.start("pairs", round_id)
    splits = store.read("users", split=("train", "valid"), columns=["user_id", "split"])
    split_of = dict(zip(splits["user_id"].to_pylist(), splits["split"].to_pylist(), strict=True))
    rule = PAIRINGS[config.pair.rule]
    dropped = {"train": Counter[str](), "valid": Counter[str]()}
    kept = Counter[str]()
    rows_in = 0
    rewards_of = _shrunk(store, round_id) if config.pair.shrinkage else None
    generations, scores = store.files("generations", round_id), store.files("scores", round_id)
    for part, (generation_file, score_file) in enumerate(zip(generations, scores, strict=True)):
        samples = pq.read_table(generation_file).sort_by(
            [("user_id", "ascending"), ("sample_id", "ascending")]
        )
        rewards = pq.read_table(score_file).sort_by([("user_id", "ascending"), ("sample_id", "ascending")])
        assert samples["user_id"].equals(rewards["user_id"]), (
            f"{score_file} does not belong to {generation_file}"
        )
        rows_in += len(samples)
        columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        reward = rewards["reward"].to_numpy()
        if rewards_of is not None:
            reward = np.concatenate([rewards_of[user] for user in np.unique(rewards["user_id"].to_numpy())])
        users, starts, counts = np.unique(
            samples["user_id"].to_numpy(), return_index=True, return_counts=True
        )
        for user, start, count in zip(users.tolist(), starts.tolist(), counts.tolist(), strict=True):
            own = samples.slice(start, count)
            completions = own["token_ids"].to_pylist()
            own_reward = reward[start : start + count]
            # without tokens (llm.source = "statistics") the texts themselves tell samples apart
            told_apart = completions if any(completions) else own["text"].to_pylist()
            found = rule(own_reward, told_apart, config.pair.min_margin)
            split = split_of[user]
            if isinstance(found, Drop):
                dropped[split][found.value] += 1
                continue
            kept[split] += 1
            best, _ = found
            rejected = worst_samples(
                own_reward, told_apart, found, config.pair.num_rejected, config.pair.min_margin
            )
            prompt = own["prompt_token_ids"][0].as_py()
            values = (
                round_id,
                user,
                split,
                prompt,
                completions[best],
                [completions[one] for one in rejected],
                own_reward[best],
                [float(own_reward[one]) for one in rejected],
            )
            for name, value in zip(_COLUMNS, values, strict=True):
                columns[name].append(value)
        store.write("pairs", pa.table(columns), round_id, part)
    reasons = {split: dict(counter) for split, counter in dropped.items()}
    if not kept["train"]:
        raise UserError(
            f"round {round_id}: no training user gave a pair ({reasons['train']}); "
            'use reward.metric = "log_likelihood", more reward.num_redraws, or a lower pair.min_margin'
        )
    say(f"  pairs: {kept['train']} training, {kept['valid']} held out; dropped {reasons['train'] or 'none'}")
    failed = store.failed("generations", round_id)
    for user, reason in zip(failed["subject_id"].to_pylist(), failed["reason"].to_pylist(), strict=True):
        dropped[split_of[user]][reason] += 1
    reasons = {split: dict(counter) for split, counter in dropped.items()}
    stats = {
        "pairs": kept["train"],
        "heldout_pairs": kept["valid"],
        "dropped": reasons["train"],
        "dropped_heldout": reasons["valid"],
    }
    return Outcome(rows_in=rows_in, rows_out=kept.total(), stats=stats)


def _shrunk(store: RunDir, round_id: int) -> dict[int, np.ndarray]:
    """Each user's rewards in sample order, pulled towards the user's mean; over all users, which tell how far to pull."""
    table = store.read("scores", round_id).sort_by([("user_id", "ascending"), ("sample_id", "ascending")])
    users, starts = np.unique(table["user_id"].to_numpy(), return_index=True)
    rewards = table["reward"].to_numpy().reshape(len(users), -1)  # every user has N samples
    num_lists = table["num_lists"].to_numpy()[starts]
    noise = list_noise(table["std_error"].to_numpy()[starts], num_lists)
    with np.errstate(divide="ignore"):  # a user without lists has no reward either
        shrunk, factors = shrink(rewards, noise / np.sqrt(num_lists))
    if not np.nansum(factors):
        raise UserError(
            f"round {round_id}: the rewards differ no more than luck makes them differ, so shrinkage leaves no pair; use "
            'reward.metric = "log_likelihood", more reward.num_redraws or more users, or set pair.shrinkage = false'
        )
    say(f"  shrinkage: rewards keep {np.nanmean(factors):.0%} of their distance from the user's mean")
    return dict(zip(users.tolist(), shrunk, strict=True))


_COLUMNS = (
    "round",
    "user_id",
    "split",
    "prompt_token_ids",
    "chosen_token_ids",
    "rejected_token_ids",
    "chosen_reward",
    "rejected_reward",
)
