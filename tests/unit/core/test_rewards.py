from __future__ import annotations

import math

import numpy as np
import pytest

from dpo4rec_ray.core.metrics import ndcg_at_k
from dpo4rec_ray.core.rewards import REWARDS, carry_over, log_likelihood_reward, ndcg_reward


def test_ndcg_reward_is_ndcg_at_5_except_without_a_positive() -> None:
    """First list: the positive at rank 2, 1 / log2(3).

    Second: no positive, NaN where the metric says 0. Third: the positive at rank 6, so 0.
    """
    scores = np.array([[6.0, 5, 4, 3, 2, 1]] * 3)
    labels = np.array([[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]])
    np.testing.assert_allclose(ndcg_reward(scores, labels), [1 / math.log2(3), np.nan, 0.0])
    assert ndcg_at_k(scores, labels, 5)[1] == 0.0


def test_log_likelihood_by_hand() -> None:
    """Scores (ln 3, 0, 0): shares 3/5, 1/5, 1/5. Positives first and third: (ln 3/5 + ln 1/5) / 2."""
    scores = np.array([[math.log(3), 0.0, 0.0]])
    value = log_likelihood_reward(scores, np.array([[1, 0, 1]]))
    np.testing.assert_allclose(value, [(math.log(3 / 5) + math.log(1 / 5)) / 2])


def test_log_likelihood_has_no_overflow_and_no_tie() -> None:
    """Scores 1,000 and 998: -ln(1 + e^-2). With 999 the same order, another reward: -ln(1 + e^-1)."""
    scores = np.array([[1000.0, 998.0], [1000.0, 999.0]])
    value = log_likelihood_reward(scores, np.array([[1, 0], [1, 0]]))
    np.testing.assert_allclose(value, [-math.log1p(math.exp(-2)), -math.log1p(math.exp(-1))])


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_ignore_padding(name: str) -> None:
    """Padding with the top score, a label or -inf leaves the reward alone.

    A list whose only positive is padding has none: NaN.
    """
    reward = REWARDS[name]
    plain = reward(np.array([[0.5, 1.5]]), np.array([[1, 0]]), None)
    scores = np.array([[9.0, 0.5, 1.5], [-np.inf, 0.5, 1.5], [9.0, 0.5, 1.5], [1.0, 2.0, 3.0]])
    labels = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0], [1, 1, 1]])
    mask = np.array([[False, True, True]] * 3 + [[False] * 3])
    with np.errstate(all="raise"):
        value = reward(scores, labels, mask)
    np.testing.assert_allclose(value, [plain[0], plain[0], np.nan, np.nan])


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_refuse_nan_scores(name: str) -> None:
    with pytest.raises(ValueError, match="NaN"):
        REWARDS[name](np.array([[np.nan, 0.0]]), np.array([[1, 0]]), None)


def test_carry_over_by_hand() -> None:
    """One user, 3 samples, halves a = (3, 1, 2), b = (5, 6, 2).

    On a the best is 0 and the worst 1: in-sample 3 - 1 = 2, held out 5 - 6 = -1. On b the best is 1 and the
    worst 2: in-sample 6 - 2 = 4, held out 1 - 2 = -1. Means 3 and -1. Ranks (3, 1, 2) and (2, 3, 1):
    differences 1, -2, 1, Spearman 1 - 6 * 6 / (3 * 8) = -.5.
    """
    result = carry_over(np.array([[3.0, 1, 2]]), np.array([[5.0, 6, 2]]))
    np.testing.assert_allclose(result.gap_in_sample, [3.0])
    np.testing.assert_allclose(result.gap_held_out, [-1.0])
    np.testing.assert_allclose(result.rank_correlation, [-0.5])


def test_carry_over_drops_users_with_nan_and_says_which_stayed() -> None:
    """Rows 0 and 2 hold a NaN in one half; row 1 is the same on both halves: all of the gap carries over."""
    half_a = np.array([[np.nan, 1.0], [0.0, 1.0], [0.0, 1.0]])
    half_b = np.array([[0.0, 1.0], [0.0, 1.0], [np.nan, np.nan]])
    result = carry_over(half_a, half_b)
    assert result.kept.tolist() == [1]
    assert (result.gap_in_sample, result.gap_held_out, result.rank_correlation) == ([1.0], [1.0], [1.0])
    assert carry_over(half_a[:1], half_b[:1]).gap_held_out.shape == (0,)


def test_carry_over_ties_share_ranks() -> None:
    """(1, 1, 2) has ranks 1.5, 1.5, 3 beside 1, 2, 3.

    Centred (-.5, -.5, 1) and (-1, 0, 1): correlation 1.5 / sqrt(1.5 * 2) = .866025. A constant half orders
    nothing: correlation 0, and its best and worst are one sample: gap 0 in that direction.
    """
    result = carry_over(np.array([[1.0, 1, 2], [4.0, 4, 4]]), np.array([[1.0, 2, 3], [1.0, 2, 3]]))
    np.testing.assert_allclose(result.rank_correlation, [0.866025, 0.0], atol=1e-6)
    np.testing.assert_allclose(result.gap_in_sample, [(1 + 2) / 2, (0 + 2) / 2])
    np.testing.assert_allclose(result.gap_held_out, [(2 + 1) / 2, 0.0])


def test_carry_over_of_noise_holds_nothing() -> None:
    """Independent halves: a gap near 3.08 (the range of 10 normals) in-sample, near 0 held out."""
    rng = np.random.default_rng(0)
    result = carry_over(rng.normal(size=(4000, 10)), rng.normal(size=(4000, 10)))
    assert result.gap_in_sample.mean() == pytest.approx(3.08, abs=0.05)
    assert result.gap_held_out.mean() == pytest.approx(0.0, abs=0.08)
    assert result.rank_correlation.mean() == pytest.approx(0.0, abs=0.03)


def test_carry_over_shapes() -> None:
    with pytest.raises(ValueError, match="U, N"):
        carry_over(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="U, N"):
        carry_over(np.zeros((2, 0)), np.zeros((2, 0)))
