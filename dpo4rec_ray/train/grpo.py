"""GRPO: all scored texts of a user, by how much better than the user's others each is (arXiv 2402.03300)."""

from __future__ import annotations

from typing import Any

import numpy as np

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.policy_gradient import advantages
from dpo4rec_ray.core.text_watch import TextWatch
from dpo4rec_ray.policy.objectives import BatchLayout, GRPOObjective
from dpo4rec_ray.policy.trainer import FirstFigure
from dpo4rec_ray.train.policy_task import Material, PolicyTask, TextSource
from dpo4rec_ray.train.scored_texts import LOGPS, AllTexts, ScoredUser, material

# How far the first step's divergence per token may be from 0: half the variance of what rounding does to a log-probability, in
# batches of another shape.
FIRST_KL_NOISE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3}


def same_reference(config: Config, moved: bool) -> bool:
    """Whether one set of log-probabilities is both that of the policy that drew the texts and that of the reference."""
    return not moved and config.grpo.sampler != "engine"


class GRPOLearner:
    """The clipped surrogate against the policy that drew the texts, pulled to the reference."""

    texts: TextSource | None = AllTexts()
    unit = "users"
    shown = ("gain", "off_policy", "clip_share")

    def material(self, task: PolicyTask) -> Material:
        scale = task.config.grpo.scale

        def group(user: ScoredUser) -> dict[str, Any] | None:
            found = advantages(np.array(user["rewards"]), scale)
            if found is None:
                return None
            kept = {name: user[name] for name in ("completions", *LOGPS) if name in user}
            return {**kept, "advantages": found.tolist()}

        same = same_reference(task.config, task.moved)
        stored = {"sampler_logps": task.sampler}
        if task.reference:
            stored["sampler_logps" if same else "reference_logps"] = task.reference
        engine = None
        if task.config.generate.token_logps:
            engine = "sampler_logps" if task.config.grpo.sampler == "engine" else "engine_logps"
        nobody = (
            'no training user\'s texts differ in reward; use reward.metric = "log_likelihood" or more '
            "reward.num_redraws"
        )
        return material(task, group, "same", nobody, stored, engine)

    def objective(self, layout: BatchLayout, task: PolicyTask) -> GRPOObjective:
        config = task.config
        same = same_reference(config, task.moved)
        return GRPOObjective(layout, config.grpo, config.generate.max_new_tokens, same_reference=same)

    def stored(self, config: Config, moved: bool) -> tuple[bool, bool]:
        """A reference that nothing pulls to is not read; with grpo.sampler "engine" the samples carry the sampler's own."""
        read = same_reference(config, moved) or config.grpo.kl_weight > 0
        return config.policy.reference == "cached" and read, moved and config.grpo.sampler != "engine"

    def temperature(self, config: Config, round_id: int) -> float:
        """The one that the texts were drawn with. (What top_k, top_p and min_p cut off is not taken into account.)"""
        temperature = config.generate_by(round_id - 1).temperature
        assert isinstance(temperature, float | int)
        return float(temperature)

    def watch(self, config: Config, num_steps: int) -> TextWatch:
        return TextWatch(num_steps, config.policy.max_kl_per_token)

    def first_figure(self, task: PolicyTask) -> FirstFigure | None:
        """Every ratio is 1, so nothing diverges. The loss says less: advantages add up to 0 whatever the ratios are.

        None with the engine's log-probabilities, which are of other kernels; and where a LoRA that is trained on has dropout,
        which moves it. (A new one is all zeros.)
        """
        if task.config.grpo.sampler == "engine" or (task.moved and task.config.policy.lora_dropout):
            return None
        return FirstFigure("off_policy", 0.0, FIRST_KL_NOISE[task.config.llm.dtype])

    def lines(self, counts: dict[str, int], heldout: dict[str, float]) -> list[str]:
        found = [f"{counts['train_same']} training users whose texts are all worth the same were left out"]
        if heldout:
            found.append(
                f"held-out users: by importance sampling the policy's texts have an advantage of {heldout['gain']:+.3f} "
                f"({counts['valid']} users)"
            )
        return found[not counts["train_same"] :]
