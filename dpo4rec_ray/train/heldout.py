"""Evaluations on the held-out pairs during a DPO training: which policy is kept, and when training no longer helps."""

from __future__ import annotations

import math

from dpo4rec_ray.policy.objectives import Metrics

HELDOUT = "heldout"  # key of an evaluation in its step's line of metrics.jsonl


class HeldoutEvaluations:
    """The evaluations so far, in the order of their steps.

    Attributes:
        losses: step -> loss on the held-out pairs; NaN where there are no such pairs.
        kept: metrics of the policy with the lowest loss.
    """

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.kept: Metrics = {}

    def add(self, step: int, metrics: Metrics) -> bool:
        """Add the evaluation after a step. Returns whether its policy is to be saved: no earlier one has a lower loss."""
        loss = metrics.get("loss", math.nan)
        best = all(not loss > earlier for earlier in self.losses.values())
        self.losses[step] = loss
        if best:
            self.kept = metrics
        return best

    def stopped(self, patience: int) -> bool:
        """Whether the last `patience` evaluations brought no lower loss. patience 0: never."""
        losses = list(self.losses.values())
        return bool(patience and losses) and len(losses) - 1 - losses.index(min(losses)) >= patience
