"""Best-of-N: supervised training on the best texts of each user (RAFT, arXiv 2304.06767)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.best_texts import best_of
from dpo4rec_ray.core.text_watch import TextWatch
from dpo4rec_ray.policy.objectives import BatchLayout, SupervisedObjective
from dpo4rec_ray.train.policy_task import Material, PolicyTask, TextSource
from dpo4rec_ray.train.scored_texts import ScoredUser, material


class BestOfNLearner:
    """The likelihood of the best texts; there is no reference."""

    texts: TextSource | None = None
    unit = "users"
    shown = ("loss", "grad_norm")

    def material(self, task: PolicyTask) -> Material:
        section = task.config.best_of_n

        def best(user: ScoredUser) -> dict[str, Any] | None:
            texts, rewards = [tuple(one) for one in user["completions"]], np.array(user["rewards"])
            found = best_of(rewards, texts, section.top, section.min_margin, section.reward_temperature)
            if found is None:
                return None
            return {"completions": [texts[place] for place in found.places], "weights": found.weights}

        nobody = 'no training user has a best text; lower best_of_n.min_margin, or use reward.metric = "log_likelihood"'
        return material(task, best, "without", nobody)

    def objective(self, layout: BatchLayout, task: PolicyTask) -> SupervisedObjective:
        return SupervisedObjective(layout)

    def stored(self, config: Config, moved: bool) -> tuple[bool, bool]:
        return False, False

    def temperature(self, config: Config, round_id: int) -> float:
        return 1.0

    def watch(self, config: Config, num_steps: int) -> TextWatch:
        return TextWatch(num_steps, config.policy.max_kl_per_token)

    def first_figure(self, task: PolicyTask) -> None:
        return None

    def lines(self, counts: dict[str, int], heldout: dict[str, float]) -> list[str]:
        if not heldout:
            return []
        return [
            f"held-out users' best texts: {heldout['loss']:.4f} nats per token over {counts['valid']} users"
        ]
