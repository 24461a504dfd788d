"""GRPO: all scored texts of a user, by how much better than the user's others each is (arXiv 2402.03300)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.policy_gradient import advantages
from dpo4rec_ray.core.text_watch import TextWatch
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.objectives import BatchLayout, GRPOObjective
from dpo4rec_ray.policy.trainer import FirstFigure
from dpo4rec_ray.train.policy_task import Material, PolicyTask, TextSource
from dpo4rec_ray.train.scored_texts import AllTexts, ScoredUser, material

# How far the first step's divergence per token may be from 0: half the variance of what rounding does to a log-probability, in
# batches of another shape.
FIRST_KL_NOISE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3}


class GRPOLearner:
    """The clipped surrogate against the policy that drew the texts, which is the reference too."""

    texts: TextSource | None = AllTexts()
    unit = "users"
    shown = ("gain", "kl_per_token", "clip_share")

    def material(self, task: PolicyTask) -> Material:
        scale = task.config.grpo.scale

        def group(user: ScoredUser) -> dict[str, Any] | None:
            found = advantages(np.array(user["rewards"]), scale)
            if found is None:
                return None
            kept = {name: user[name] for name in ("completions", "logps") if name in user}
            return {**kept, "advantages": found.tolist()}

        found = material(task, group, "same")
        if not found.counts["train"]:
            raise UserError(
                f"round {task.round_id}: no training user's texts differ in reward ({found.counts}); use "
                'reward.metric = "log_likelihood" or more reward.num_redraws'
            )
        return found

    def objective(self, layout: BatchLayout, config: Config) -> GRPOObjective:
        return GRPOObjective(layout, config.grpo, config.generate.max_new_tokens)

    def temperature(self, config: Config, round_id: int) -> float:
        """The one that the texts were drawn with. (What top_k, top_p and min_p cut off is not taken into account.)"""
        temperature = config.generate.of_policy(round_id - 1).temperature
        assert isinstance(temperature, float | int)
        return float(temperature)

    def watch(self, config: Config, num_steps: int) -> TextWatch:
        return TextWatch(num_steps, config.policy.max_kl_per_token)

    def first_figure(self, task: PolicyTask) -> FirstFigure | None:
        """Every ratio is 1, so nothing diverges. The loss says less: advantages add up to 0 whatever the ratios are."""
        return None if task.moved else FirstFigure("kl_per_token", 0.0, FIRST_KL_NOISE[task.config.llm.dtype])

    def lines(self, counts: dict[str, int], heldout: dict[str, float]) -> list[str]:
        found = [f"{counts['train_same']} training users whose texts are all worth the same were left out"]
        if heldout:
            found.append(
                f"held-out users: by importance sampling the policy's texts have an advantage of {heldout['gain']:+.3f} "
                f"({counts['valid']} users)"
            )
        return found[not counts["train_same"] :]
