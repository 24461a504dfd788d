from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from dpo4rec_ray.core.pairing import (
    PAIRINGS,
    Drop,
    Limits,
    Made,
    best_vs_worst,
    random_pairs,
    top_vs_bottom,
    worst_samples,
    worst_vs_best,
)

DISTINCT = [[1], [2], [3], [4]]


def test_best_is_chosen_and_worst_rejected() -> None:
    """Rewards .2 .9 .1 .5: sample 1 is the highest, 2 the lowest."""
    assert PAIRINGS["best_vs_worst"](np.array([0.2, 0.9, 0.1, 0.5]), DISTINCT, Limits()) == Made([(1, 2)])


def test_the_first_of_equals() -> None:
    """.9 twice and .1 twice: samples 0 and 1."""
    assert best_vs_worst(np.array([0.9, 0.1, 0.9, 0.1]), DISTINCT, Limits()).pairs == [(0, 1)]


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
    limits = Limits(min_margin=min_margin)
    assert best_vs_worst(np.array(rewards), completions, limits) == Made([], reason)


def test_a_spread_equal_to_the_margin_passes() -> None:
    """.75 - .5 = .25, exact in binary: not below the margin."""
    assert best_vs_worst(np.array([0.5, 0.75]), [[1], [2]], Limits(min_margin=0.25)).pairs == [(1, 0)]


def test_completions_may_be_arrays() -> None:
    """Rows read from Parquet arrive as numpy arrays."""
    completions = [np.array([1, 2]), np.array([1, 3])]
    assert best_vs_worst(np.array([0.0, 1.0], dtype=np.float32), completions, Limits()).pairs == [(1, 0)]


def test_counts_must_match() -> None:
    with pytest.raises(ValueError, match="do not match 2 completions"):
        best_vs_worst(np.zeros(3), [[1], [2]], Limits())


def test_reasons_read_as_text() -> None:
    """They are counted by name in the report."""
    assert f"{Drop.NO_LISTS}" == "no_training_list"


def test_the_next_best_goes_with_the_next_worst() -> None:
    """Rewards .1 .9 .5 .7 .3: best to worst are 1, 3, 2, 4, 0; the middle one is left over."""
    rewards, texts = np.array([0.1, 0.9, 0.5, 0.7, 0.3]), [[1], [2], [3], [4], [5]]
    assert top_vs_bottom(rewards, texts, Limits()) == best_vs_worst(rewards, texts, Limits())
    assert top_vs_bottom(rewards, texts, Limits(max_pairs=2)) == Made([(1, 0), (3, 4)])
    assert top_vs_bottom(rewards, texts, Limits(max_pairs=3)) == Made([(1, 0), (3, 4)], Drop.USED)


def test_a_series_ends_where_the_margin_does() -> None:
    """Margins of the pairs: 1 - 0 = 1 and .75 - .5 = .25. A margin that luck makes is named as luck."""
    rewards = np.array([1.0, 0.75, 0.5, 0.0])
    assert top_vs_bottom(rewards, DISTINCT, Limits(2, min_margin=0.25)).pairs == [(0, 3), (1, 2)]
    assert top_vs_bottom(rewards, DISTINCT, Limits(2, min_margin=0.5)) == Made([(0, 3)], Drop.MARGIN)
    assert top_vs_bottom(rewards, DISTINCT, Limits(2, min_reliable=0.5)) == Made([(0, 3)], Drop.LUCK)
    assert best_vs_worst(rewards, DISTINCT, Limits(min_reliable=1.5)) == Made([], Drop.LUCK)
    tied = np.array([1.0, 0.5, 0.5, 0.0])
    assert top_vs_bottom(tied, DISTINCT, Limits(2)) == Made([(0, 3)], Drop.TIE)


def test_equal_texts_count_once_in_a_series() -> None:
    """Samples 0 and 1 are one text, as are 3 and 4: two distinct texts beside sample 2 make one pair."""
    rewards = np.array([0.9, 0.9, 0.5, 0.1, 0.1])
    found = top_vs_bottom(rewards, [[1], [1], [2], [3], [3]], Limits(max_pairs=2))
    assert found == Made([(0, 3)], Drop.USED)


def test_several_rejected_texts_keep_to_the_limits() -> None:
    """Worst first: .1, .3, then .6 is too close to .9 with a limit of .5."""
    rewards = np.array([0.9, 0.3, 0.1, 0.6])
    assert worst_samples(rewards, DISTINCT, (0, 2), 4, Limits()) == [2, 1, 3]
    assert worst_samples(rewards, DISTINCT, (0, 2), 4, Limits(min_margin=0.5)) == [2, 1]
    assert worst_samples(rewards, DISTINCT, (0, 2), 1, Limits()) == [2]


def test_swapped_pairs_are_those_of_the_reward_the_wrong_way_round() -> None:
    """Rewards .1 .9 .5 .7 .3: 0 is chosen against 1, then 4 against 3."""
    rewards, texts = np.array([0.1, 0.9, 0.5, 0.7, 0.3]), [[1], [2], [3], [4], [5]]
    assert worst_vs_best(rewards, texts, Limits(max_pairs=3)) == Made([(0, 1), (4, 3)], Drop.USED)
    assert worst_vs_best(rewards, texts, Limits(min_margin=0.9)) == Made([], Drop.MARGIN)


def test_random_pairs_are_as_many_and_follow_no_reward() -> None:
    """Of 2,000 users each pair of four texts comes in either order as often: 12 ordered pairs, 167 +- 62 (five deviations)."""
    rewards = np.array([0.2, 0.9, 0.1, 0.5])
    drawn = [random_pairs(rewards, DISTINCT, Limits(seed=seed)) for seed in range(2000)]
    assert drawn == [random_pairs(rewards, DISTINCT, Limits(seed=seed)) for seed in range(2000)]
    counts = Counter(made.pairs[0] for made in drawn)
    assert len(counts) == 12 and all(105 <= count <= 229 for count in counts.values())
    assert {len(made.pairs) for made in drawn} == {1}
    two = [random_pairs(rewards, DISTINCT, Limits(max_pairs=2, seed=seed)).pairs for seed in range(20)]
    assert all(sorted(place for pair in pairs for place in pair) == [0, 1, 2, 3] for pairs in two)


def test_random_pairs_have_the_users_of_the_reward() -> None:
    """Equal texts count once, and who gives no pair by reward gives none."""
    rewards = np.array([0.9, 0.9, 0.1, 0.1])
    same = [random_pairs(rewards, [[1], [1], [2], [2]], Limits(seed=seed)).pairs for seed in range(20)]
    assert {tuple(sorted(pair)) for pairs in same for pair in pairs} == {(0, 2)}
    assert random_pairs(np.full(4, 0.5), DISTINCT, Limits()) == Made([], Drop.TIE)
    assert random_pairs(np.full(4, np.nan), DISTINCT, Limits()) == Made([], Drop.NO_LISTS)
