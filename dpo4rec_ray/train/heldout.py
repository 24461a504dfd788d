"""Evaluations on the held-out pairs during a DPO training: which policy is kept, and when training no longer helps."""

from __future__ import annotations

import math
from collections.abc import Mapping

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
        """Whether the last `patience` evaluations brought no lower loss. patience 0, or no held-out pairs: never."""
        losses = list(self.losses.values())
        if not patience or not losses or math.isnan(losses[-1]):
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= patience


def mixed(by_kind: Mapping[str, Metrics], trained: Mapping[str, int]) -> Metrics:
    """The held-out metrics as the training weighs the kinds of rows, and the accuracy of each kind of pairs as accuracy_KIND.

    by_kind: metrics of the held-out rows of each kind (of pairs: core.pairing.Kind); empty where there are none. trained:
    training rows of each kind. A kind that is not trained on has no part in the loss that chooses the policy, unless there is
    no other.
    """
    found = {kind: metrics for kind, metrics in by_kind.items() if metrics}
    weights = {kind: trained.get(kind, 0) for kind in found}
    if not sum(weights.values()):
        weights = dict.fromkeys(found, 1)
    total = sum(weights.values())
    names = next(iter(found.values()), {})
    mean = {name: sum(weights[kind] * found[kind][name] for kind in found) / total for name in names}
    accuracies = {
        f"accuracy_{kind}": metrics["accuracy"] for kind, metrics in found.items() if "accuracy" in metrics
    }
    return {**mean, **accuracies}
