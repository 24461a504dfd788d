"""GRPO: all scored texts of a user, by how much better than the user's others each is (arXiv 2402.03300)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.policy_gradient import advantages
from dpo4rec_ray.core.text_watch import TextWatch
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.objectives import BatchLayout, GRPOObjective
from dpo4rec_ray.policy.rows import ArrowRows
from dpo4rec_ray.train.policy_task import Material, PolicyTask, TextSource
from dpo4rec_ray.train.reference_logps import read_reference
from dpo4rec_ray.train.scored_texts import AllTexts, scored_groups

# How far the first loss may be from 0, where every ratio is 1 and advantages cancel: rounding of token log-probabilities.
FIRST_LOSS_NOISE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}


class GRPOLearner:
    """The clipped surrogate against the policy that drew the texts, which is the reference too."""

    texts: TextSource | None = AllTexts()
    unit = "users"
    shown = ("gain", "kl_per_token", "clip_share")

    def material(self, task: PolicyTask) -> Material:
        tables = scored_groups(task.config, task.store, task.round_id)
        stored = _by_user(read_reference(task.reference)) if task.reference else None
        rows, counts = {}, {}
        for split, table in tables.items():
            rows[split], own = group_rows(table, task.config, stored)
            counts |= {split: len(rows[split]), **{f"{split}_{name}": count for name, count in own.items()}}
        if not rows["train"]:
            raise UserError(
                f"round {task.round_id}: no training user's texts differ in reward ({counts}); use "
                'reward.metric = "log_likelihood" or more reward.num_redraws'
            )
        lengths = [len(row["prompt_token_ids"]) + sum(map(len, row["completions"])) for row in rows["train"]]
        return Material(
            ArrowRows(pa.Table.from_pylist(rows["train"])),
            np.array(lengths),
            {"users": rows["valid"]},
            {"users": len(rows["train"])},
            counts,
        )

    def objective(self, layout: BatchLayout, config: Config) -> GRPOObjective:
        return GRPOObjective(layout, config.grpo, config.generate.max_new_tokens)

    def temperature(self, config: Config, round_id: int) -> float:
        """The one that the texts were drawn with. (What top_k, top_p and min_p cut off is not taken into account.)"""
        temperature = config.generate.of_policy(round_id - 1).temperature
        assert isinstance(temperature, float | int)
        return float(temperature)

    def watch(self, config: Config, num_steps: int) -> TextWatch:
        return TextWatch(num_steps, config.policy.max_kl_per_token)

    def first_loss(self, task: PolicyTask) -> tuple[float, float] | None:
        """Every ratio is 1 and the divergence 0, so the loss of a group is minus the weighted sum of its advantages.

        With one weight per text that is 0; with other weights long and short texts do not cancel, and nothing is expected.
        """
        if task.config.grpo.token_weights != "sequence" or task.moved:
            return None
        return 0.0, FIRST_LOSS_NOISE[task.config.llm.dtype]

    def lines(self, counts: dict[str, int], heldout: dict[str, float]) -> list[str]:
        found = [f"{counts['train_same']} training users whose texts are all worth the same were left out"]
        if heldout:
            found.append(
                f"held-out users: texts of the policy are worth {heldout['gain']:+.3f} of a standard deviation more, by "
                f"importance sampling over {counts['valid']} users"
            )
        return found[not counts["train_same"] :]


def group_rows(
    table: pa.Table, config: Config, stored: dict[int, list[list[float]]] | None
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of `GRPOObjective` from `scored_texts.groups_of`, and how many groups and texts are left out, by reason.

    stored: log-probabilities of each user's texts, token by token. A text that is too long to train on is no part of its group.
    """
    rows, counts = [], {"same": 0, "too_long": 0}
    for group in table.to_pylist():
        room = config.max_training_tokens - len(group["prompt_token_ids"])
        fits = [place for place, text in enumerate(group["completions"]) if len(text) <= room]
        counts["too_long"] += len(group["completions"]) - len(fits)
        own = advantages(np.array([group["rewards"][place] for place in fits]), config.grpo.scale)
        if own is None:
            counts["same"] += 1
            continue
        row = {
            "prompt_token_ids": group["prompt_token_ids"],
            "completions": [group["completions"][place] for place in fits],
            "advantages": own.tolist(),
        }
        if stored is not None:
            logps = stored[group["user_id"]]
            row["logps"] = [logps[place] for place in fits]
        rows.append(row)
    return rows, counts


def _by_user(reference: pa.Table) -> dict[int, list[list[float]]]:
    return dict(zip(reference["user_id"].to_pylist(), reference["logps"].to_pylist(), strict=True))
