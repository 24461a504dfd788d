from __future__ import annotations

import numpy as np
import pytest

from dpo4rec_ray.core.pairing import PAIRINGS, Drop, best_vs_worst

DISTINCT = [[1], [2], [3], [4]]


def test_best_is_chosen_and_worst_rejected() -> None:
    """Rewards .2 .9 .1 .5: sample 1 is the highest, 2 the lowest."""
    assert PAIRINGS["best_vs_worst"](np.array([0.2, 0.9, 0.1, 0.5]), DISTINCT, 0.0) == (1, 2)


def test_the_first_of_equals() -> None:
    """.9 twice and .1 twice: samples 0 and 1."""
    assert best_vs_worst(np.array([0.9, 0.1, 0.9, 0.1]), DISTINCT, 0.0) == (0, 1)


@pytest.mark.parametrize(
    ("rewards", "completions", "min_margin", "reason"),
    [
        ([], [], 0.0, Drop.FEW),
        ([0.5], [[1]], 0.0, Drop.FEW),
        ([np.nan, np.nan], [[1], [2]], 0.0, Drop.NO_LISTS),
        ([0.5, np.nan, 0.1], [[1], [2], [3]], 0.0, Drop.NO_LISTS),
        ([0.5, 0.5], [[1], [2]], 0.0, Drop.TIE),
        ([0.5, 0.5], [[1], [1]], 0.0, Drop.SAME),  # one text: the policy's fault, not the reward's
        ([0.5, 0.4], [[1, 2], (1, 2)], 0.0, Drop.SAME),
        ([0.9, 0.5, 0.1], [[1], [2], [1]], 0.0, Drop.SAME),  # the two that were picked
        ([0.5, 0.25], [[1], [2]], 0.5, Drop.MARGIN),
    ],
)
def test_reasons_for_no_pair(
    rewards: list[float], completions: list[list[int]], min_margin: float, reason: Drop
) -> None:
    assert best_vs_worst(np.array(rewards), completions, min_margin) is reason


def test_a_spread_equal_to_the_margin_passes() -> None:
    """.75 - .5 = .25, exact in binary: not below the margin."""
    assert best_vs_worst(np.array([0.5, 0.75]), [[1], [2]], 0.25) == (1, 0)


def test_completions_may_be_arrays() -> None:
    """Rows read from Parquet arrive as numpy arrays."""
    completions = [np.array([1, 2]), np.array([1, 3])]
    assert best_vs_worst(np.array([0.0, 1.0], dtype=np.float32), completions, 0.0) == (1, 0)


def test_counts_must_match() -> None:
    with pytest.raises(ValueError, match="do not match 2 completions"):
        best_vs_worst(np.zeros(3), [[1], [2]], 0.0)


def test_reasons_read_as_text() -> None:
    """They are counted by name in the report."""
    assert f"{Drop.NO_LISTS}" == "no_training_list"
