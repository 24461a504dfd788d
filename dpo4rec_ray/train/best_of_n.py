"""Best-of-N: supervised training on the best texts of each user (RAFT, arXiv 2304.06767)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.best_texts import best_of
from dpo4rec_ray.core.text_watch import TextWatch
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.objectives import BatchLayout, SupervisedObjective
from dpo4rec_ray.policy.rows import ArrowRows
from dpo4rec_ray.train.policy_task import Material, PolicyTask, TextSource
from dpo4rec_ray.train.scored_texts import scored_groups


class BestOfNLearner:
    """The likelihood of the best texts; there is no reference."""

    texts: TextSource | None = None
    unit = "users"
    shown = ("loss", "grad_norm")

    def material(self, task: PolicyTask) -> Material:
        tables = scored_groups(task.config, task.store, task.round_id)
        rows, counts = {}, {}
        for split, table in tables.items():
            rows[split], own = chosen_rows(table, task.config)
            counts |= {split: len(rows[split]), **{f"{split}_{name}": count for name, count in own.items()}}
        if not rows["train"]:
            raise UserError(
                f"round {task.round_id}: no training user has a best text ({counts}); lower best_of_n.min_margin, or use "
                'reward.metric = "log_likelihood"'
            )
        lengths = [len(row["prompt_token_ids"]) + sum(map(len, row["completions"])) for row in rows["train"]]
        return Material(
            ArrowRows(pa.Table.from_pylist(rows["train"])),
            np.array(lengths),
            {"users": rows["valid"]},
            {"users": len(rows["train"])},
            counts,
        )

    def objective(self, layout: BatchLayout, config: Config) -> SupervisedObjective:
        return SupervisedObjective(layout)

    def temperature(self, config: Config, round_id: int) -> float:
        return 1.0

    def watch(self, config: Config, num_steps: int) -> TextWatch:
        return TextWatch(num_steps, config.policy.max_kl_per_token)

    def first_loss(self, task: PolicyTask) -> None:
        return None

    def lines(self, counts: dict[str, int], heldout: dict[str, float]) -> list[str]:
        if not heldout:
            return []
        return [
            f"held-out users' best texts: {heldout['loss']:.4f} nats per token over {counts['valid']} users"
        ]


def chosen_rows(table: pa.Table, config: Config) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of `SupervisedObjective` from `scored_texts.groups_of`, and how many users have none, by reason.

    A text that is too long to train on is no candidate.
    """
    section, rows = config.best_of_n, []
    counts = {"texts": 0, "without": 0, "too_long": 0}
    for group in table.to_pylist():
        room = config.max_training_tokens - len(group["prompt_token_ids"])
        fits = [place for place, text in enumerate(group["completions"]) if len(text) <= room]
        counts["too_long"] += len(group["completions"]) - len(fits)
        texts = [tuple(group["completions"][place]) for place in fits]
        rewards = np.array([group["rewards"][place] for place in fits])
        best = (
            best_of(rewards, texts, section.top, section.min_margin, section.reward_temperature)
            if fits
            else None
        )
        if best is None:
            counts["without"] += 1
            continue
        counts["texts"] += len(best.places)
        rows.append(
            {
                "prompt_token_ids": group["prompt_token_ids"],
                "completions": [list(texts[place]) for place in best.places],
                "weights": best.weights,
            }
        )
    return rows, counts
