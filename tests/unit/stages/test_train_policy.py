"""Which weights a turn's training starts from."""

from __future__ import annotations

import pytest

from dpo4rec_ray.policy.model import PolicyWeights
from dpo4rec_ray.stages.train_policy import base_of

UNMERGED = PolicyWeights(base="base", lora="lora")
MERGED = PolicyWeights(base="base", lora="lora", merged="merged")
FULL = PolicyWeights(base="full")


@pytest.mark.parametrize(
    ("before", "tuning", "moved", "expected"),
    [
        (FULL, "lora", False, "full"),  # the base LLM, in the first turn
        (MERGED, "lora", False, "merged"),  # the policy before is the reference: a new LoRA on it
        (UNMERGED, "lora", False, ""),
        (MERGED, "lora", True, "base"),  # its LoRA on the reference is trained on
        (UNMERGED, "lora", True, "base"),
        (FULL, "full", False, "full"),
        (FULL, "full", True, "full"),
    ],
)
def test_where_training_starts(before: PolicyWeights, tuning: str, moved: bool, expected: str) -> None:
    assert base_of(before, tuning, moved) == expected
