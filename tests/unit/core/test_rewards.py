from __future__ import annotations

import math

import numpy as np
import pytest

from dpo4rec_ray.core.metrics import METRICS, list_metrics
from dpo4rec_ray.core.rewards import (
    REWARDS,
    best_of_n,
    carried_share,
    carry_over,
    check_reward,
    list_noise,
    list_rewards,
    log_likelihood_reward,
    personal,
    rank_agreement,
    shrink,
    tie_rates,
)
from dpo4rec_ray.errors import UserError

NAMES = [name.replace("@k", "@5") for name in REWARDS]
NAN = float("nan")


def test_rewards_of_metrics_by_hand() -> None:
    """First list: the positive at rank 2: NDCG 1 / log2(3), precision 1/2 at its one hit, 1/2, found.

    Second: no positive, NaN where the metric says 0. Third: the positive at rank 6, so 0.
    """
    scores = np.array([[6.0, 5, 4, 3, 2, 1]] * 3)
    labels = np.array([[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]])
    expected = {"ndcg@5": 1 / math.log2(3), "map@5": 0.5, "map_paper@5": 0.5, "mrr@5": 0.5, "hr@5": 1.0}
    found = list_rewards(scores, labels, list(expected))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], [value, np.nan, 0.0])
        np.testing.assert_array_equal(list_rewards(scores, labels, [name])[name], found[name])
        assert list_metrics(scores, labels, [name])[name][1] == 0.0
    assert list_rewards(scores, labels, ["mrr@6"])["mrr@6"][2] == pytest.approx(1 / 6)


def test_list_rewards_are_the_single_ones() -> None:
    """Every reward at once, in the order asked for, equals each by itself; padding included."""
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(20, 6)), rng.integers(0, 3, (20, 6))
    mask = rng.random((20, 6)) < 0.7
    names = ["log_likelihood", *(f"{metric}@{k}" for k in (3, 1) for metric in METRICS)]
    found = list_rewards(scores, labels, names, mask)
    assert list(found) == names
    for name in names:
        np.testing.assert_array_equal(list_rewards(scores, labels, [name], mask)[name], found[name])


def test_known_rewards_and_unknown_ones() -> None:
    """Every entry of REWARDS is a name once k is a number; anything else names them all."""
    assert REWARDS == ("ndcg@k", "map_paper@k", "map@k", "mrr@k", "hr@k", "log_likelihood")
    for name in ("ndcg", "ndcg@k", "ndcg@0", "log_likelihood@5", "recall@5", ""):
        with pytest.raises(
            UserError, match=f"unknown reward '{name}'. Known: ndcg@k, .*hr@k, log_likelihood"
        ):
            check_reward(name)
        with pytest.raises(UserError, match="unknown reward"):
            list_rewards(np.zeros((1, 2)), np.ones((1, 2)), ["ndcg@5", name])


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


@pytest.mark.parametrize("name", NAMES)
def test_rewards_ignore_padding(name: str) -> None:
    """Padding with the top score, a label or -inf leaves the reward alone.

    A list whose only positive is padding has none: NaN.
    """
    plain = list_rewards(np.array([[0.5, 1.5]]), np.array([[1, 0]]), [name])[name]
    scores = np.array([[9.0, 0.5, 1.5], [-np.inf, 0.5, 1.5], [9.0, 0.5, 1.5], [1.0, 2.0, 3.0]])
    labels = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0], [1, 1, 1]])
    mask = np.array([[False, True, True]] * 3 + [[False] * 3])
    with np.errstate(all="raise"):
        value = list_rewards(scores, labels, [name], mask)[name]
    np.testing.assert_allclose(value, [plain[0], plain[0], np.nan, np.nan])


@pytest.mark.parametrize("name", NAMES)
def test_rewards_refuse_nan_scores(name: str) -> None:
    with pytest.raises(ValueError, match="NaN"):
        list_rewards(np.array([[np.nan, 0.0]]), np.array([[1, 0]]), [name])


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


def test_carry_over_measured_by_another_reward() -> None:
    """Chosen by a = (3, 1, 2) and b = (5, 6, 2), measured by a' = (10, 20, 40) and b' = (4, 2, 1).

    On a the best is 0 and the worst 1: 10 - 20 = -10 there, 4 - 2 = 2 held out. On b the best is 1, the worst 2:
    2 - 1 = 1 there, 20 - 40 = -20 held out. Means -4.5 and -9. Ranks of a (3, 1, 2) with b' (3, 2, 1): differences
    0, -1, 1, Spearman 1 - 6 * 2 / 24 = .5; of b (2, 3, 1) with a' (1, 2, 3): 1, 1, -2, -.5. Mean 0.
    """
    result = carry_over(
        np.array([[3.0, 1, 2]]), np.array([[5.0, 6, 2]]), np.array([[10.0, 20, 40]]), np.array([[4.0, 2, 1]])
    )
    np.testing.assert_allclose(result.gap_in_sample, [-4.5])
    np.testing.assert_allclose(result.gap_held_out, [-9.0])
    np.testing.assert_allclose(result.rank_correlation, [0.0], atol=1e-12)
    with pytest.raises(ValueError, match="negative"):
        carried_share(result)


def test_carry_over_drops_users_the_measure_does_not_know() -> None:
    half = np.array([[0.0, 1.0], [0.0, 2.0]])
    unknown = np.array([[NAN, NAN], [0.0, 1.0]])
    assert carry_over(half, half, half, unknown).kept.tolist() == [1]
    assert carry_over(half, half, unknown, half).kept.tolist() == [1]
    with pytest.raises(ValueError, match="U, N"):
        carry_over(half, half, half, half[:1])


def test_carried_share_by_hand() -> None:
    """Two users with gaps 4 and 1 in sample, 4 and -1 held out: (4 - 1) / (4 + 1) = .6.

    Resamples: the first alone 4/4, both 3/5, the second alone -1/1, with chances 1/4, 1/2, 1/4: interval -1 to 1.
    """
    result = carry_over(np.array([[4.0, 0.0], [0.0, 1.0]]), np.array([[4.0, 0.0], [1.0, 0.0]]))
    np.testing.assert_allclose(result.gap_in_sample, [4.0, 1.0])
    np.testing.assert_allclose(result.gap_held_out, [4.0, -1.0])
    share = carried_share(result)
    assert share[:3] == pytest.approx((0.6, -1.0, 1.0))
    assert share.p_value == pytest.approx(0.5, abs=0.09)  # a quarter of the resamples is below 0


def test_carried_share_of_a_known_model() -> None:
    """Half of the variance is the sample's own, half luck: the held-out gap is half of the one in sample.

    For normal values the expected reward on the other half is correlation * reward, so the share is the correlation.
    """
    rng = np.random.default_rng(1)
    own = rng.normal(size=(3000, 10))
    share = carried_share(carry_over(own + rng.normal(size=own.shape), own + rng.normal(size=own.shape)))
    assert share.mean == pytest.approx(0.5, abs=0.027)  # 4.5 standard deviations
    assert share.low < share.mean < share.high < share.low + 0.03


def test_tie_rates_by_hand() -> None:
    """Users (2, 1, 2): best tied, 1 of 3 pairs. (1, 1, 2): 1 of 3 pairs. (5, 5, 5): all. (1, 2, 3): none. One NaN.

    Best tied 2 of 4, all tied 1 of 4, pairs (1 + 1 + 3 + 0) / 12.
    """
    rewards = np.array([[2.0, 1, 2], [1, 1, 2], [5, 5, 5], [1, 2, 3], [NAN, 1, 1]])
    assert tie_rates(rewards) == pytest.approx((2 / 4, 1 / 4, 5 / 12))
    assert tie_rates(rewards)._fields == ("best", "all", "pairs")
    assert np.isnan(tie_rates(rewards[4:])).all()
    with pytest.raises(ValueError, match="N >= 2"):
        tie_rates(np.zeros((3, 1)))


def test_rank_agreement_by_hand() -> None:
    """(1, 2, 3) with (10, 30, 20): 1 - 6 * 2 / 24 = .5. Reversed: -1. Mean -.25.

    Left out: a user constant in one of the two, and one with a NaN.
    """
    a = np.array([[1.0, 2, 3], [1, 2, 3], [4, 4, 4], [1, 2, 3], [NAN, 2, 3], [1, 2, 3]])
    b = np.array([[10.0, 30, 20], [3, 2, 1], [1, 2, 3], [4, 4, 4], [1, 2, 3], [1, 2, NAN]])
    assert rank_agreement(a, b) == pytest.approx(-0.25)
    assert rank_agreement(b, a) == pytest.approx(-0.25)
    assert math.isnan(rank_agreement(a[2:], b[2:]))
    with pytest.raises(ValueError, match="same samples"):
        rank_agreement(a, b[:2])
    with pytest.raises(ValueError, match="N >= 2"):
        rank_agreement(a[:, :1], b[:, :1])


def test_shrink_by_hand() -> None:
    """Variances 4, 16 and 4; standard errors 1, 2 and unknown.

    tau2 = ((4 - 1) + (16 - 4)) / 2 = 7.5: factors 7.5 / 8.5 and 7.5 / 11.5. The third user's error is the mean of
    var - tau2 over such users, 4 - 7.5, so 0 and factor 1. With variances 4 and 20 there it is 12 - 7.5 = 4.5:
    factor 7.5 / 12 for both.
    """
    rewards = np.array([[1.0, 3, 5], [0, 4, 8], [7, 9, 11]])
    shrunk, factors = shrink(rewards, np.array([1.0, 2.0, NAN]))
    np.testing.assert_allclose(factors, [7.5 / 8.5, 7.5 / 11.5, 1.0])
    np.testing.assert_allclose(shrunk[0], [3 - 2 * 7.5 / 8.5, 3, 3 + 2 * 7.5 / 8.5])
    np.testing.assert_allclose(shrunk[2], rewards[2])
    far = math.sqrt(20)
    _, factors = shrink(np.vstack([rewards, [[-far, 0, far]]]), np.array([1.0, 2.0, NAN, NAN]))
    np.testing.assert_allclose(factors, [7.5 / 8.5, 7.5 / 11.5, 7.5 / 12, 7.5 / 12])


def test_shrink_leaves_unknown_users_alone() -> None:
    """Rows with a NaN keep their values and do not count; tau2 = 4 - 1 is the first user's alone."""
    rewards = np.array([[1.0, 3, 5], [NAN, 100, 900], [NAN, NAN, NAN]])
    shrunk, factors = shrink(rewards, np.array([1.0, 5.0, NAN]))
    np.testing.assert_allclose(factors, [0.75, NAN, NAN])
    np.testing.assert_array_equal(shrunk[1:], rewards[1:])
    np.testing.assert_allclose(shrunk[0], [1.5, 3, 4.5])
    np.testing.assert_array_equal(shrink(rewards[1:], np.array([1.0, NAN]))[0], rewards[1:])


def test_shrink_of_luck_alone_ties_all_samples() -> None:
    """Spread 4 with error 3: tau2 = max(0, 4 - 9). Rewards without spread or error stay."""
    shrunk, factors = shrink(np.array([[1.0, 3, 5], [2, 2, 2]]), np.array([3.0, 0.0]))
    np.testing.assert_array_equal(shrunk, [[3, 3, 3], [2, 2, 2]])
    np.testing.assert_array_equal(factors, [0.0, 1.0])


def test_shrink_finds_what_holds() -> None:
    """Worth with variance 1, errors of 1 and of 2: factors near 1/2 and 1/5, and the shrunk gap is the one of the worth.

    For normal values E(worth | rewards) is the shrunk reward, so the best-worst gap by rewards, measured in worth, has
    the shrunk gap as its mean. The unknown errors are those of the users with 2, found from their spread.
    """
    rng = np.random.default_rng(0)
    worth = rng.normal(size=(6000, 10))
    std_errors = np.repeat([1.0, 2.0], 3000)
    rewards = worth + rng.normal(size=worth.shape) * std_errors[:, None]
    given = np.where(np.arange(6000) < 4500, std_errors, NAN)
    shrunk, factors = shrink(rewards, given)
    np.testing.assert_allclose(factors[[0, 3000, 5999]], [1 / 2, 1 / 5, 1 / 5], atol=0.02)
    np.testing.assert_array_equal(np.argsort(shrunk, axis=1), np.argsort(rewards, axis=1))
    best, worst = rewards.argmax(axis=1)[:, None], rewards.argmin(axis=1)[:, None]
    held = (np.take_along_axis(worth, best, 1) - np.take_along_axis(worth, worst, 1)).mean()
    assert (shrunk.max(axis=1) - shrunk.min(axis=1)).mean() == pytest.approx(held, rel=0.04)
    assert (rewards.max(axis=1) - rewards.min(axis=1)).mean() > 2 * held


def test_shrink_mistakes() -> None:
    with pytest.raises(UserError, match="none of 2 users has a standard error"):
        shrink(np.array([[1.0, 2], [3, 4]]), np.array([NAN, NAN]))
    with pytest.raises(ValueError, match="N >= 2"):
        shrink(np.ones((3, 1)), np.ones(3))
    with pytest.raises(ValueError, match="not negative"):
        shrink(np.ones((2, 3)), np.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="must be \\[2\\]"):
        shrink(np.ones((2, 3)), np.ones(3))


def test_list_noise_is_pooled_by_degrees_of_freedom() -> None:
    """Two lists with error 1: variance of a list 2, one degree; five lists with error 2: 20, four. (2 + 80) / 5."""
    errors, sizes = np.array([1.0, NAN, 2.0, NAN]), np.array([2, 1, 5, 0])
    assert list_noise(errors, sizes) == pytest.approx(np.sqrt(82 / 5))
    assert np.isnan(list_noise(errors[1:2], sizes[1:2]))


def test_shrunk_gaps_hold_where_errors_are_estimated_from_two_lists() -> None:
    """Errors of single users promise too much where they come out small by chance; pooled they promise what holds."""
    rng = np.random.default_rng(0)
    num_users, num_samples, num_lists = 4000, 10, 2
    worth = 0.3 * rng.normal(size=(num_users, num_samples))
    values = worth[:, :, None] + rng.normal(size=(num_users, num_samples, num_lists))
    rest = (
        values
        - values.mean(2, keepdims=True)
        - values.mean(1, keepdims=True)
        + values.mean((1, 2), keepdims=True)
    )
    freedom = (num_samples - 1) * (num_lists - 1)
    errors = np.sqrt((rest**2).sum((1, 2)) / freedom / num_lists)
    pooled = list_noise(errors, np.full(num_users, num_lists)) / np.sqrt(num_lists)

    def kept_promise(errors: np.ndarray) -> float:
        """True gap over promised gap of the tenth of the users with the largest promise."""
        shrunk, _ = shrink(values.mean(2), errors)
        best, worst = shrunk.argmax(1), shrunk.argmin(1)
        promised = shrunk.max(1) - shrunk.min(1)
        most = np.argsort(promised)[-num_users // 10 :]
        return float((worth[most, best[most]] - worth[most, worst[most]]).mean() / promised[most].mean())

    assert kept_promise(np.full(num_users, pooled)) == pytest.approx(1.0, abs=0.1)
    assert kept_promise(errors) < 0.7


def test_what_helps_everybody_earns_nothing() -> None:
    """Two texts: a manner worth .5 to its user and .5 to others, and one worth .4 to its user and .1 to others."""
    found = personal(np.array([[0.5, 0.4]], np.float32), np.array([[0.5, 0.1]], np.float32))
    np.testing.assert_allclose(found, [[0.0, 0.3]], atol=1e-7)
    assert np.isnan(personal(np.array([NAN, 1.0]), np.array([1.0, NAN]))).all()
    with pytest.raises(ValueError, match="same samples"):
        personal(np.zeros(2), np.zeros(3))


def test_the_best_of_n_is_measured_where_it_was_not_chosen() -> None:
    """User 0: half a chooses sample 1, worth 0 on half b, whose mean is .3; half b chooses sample 0, worth .1 on half a, whose
    mean is .4: -.3 both ways. User 1: both choose sample 2: .9 - .3 and .6 - .2. User 2 has one half."""
    half_a = np.array([[0.1, 0.9, 0.2], [0.0, 0.0, 0.6], [0.5, 0.1, 0.2]])
    half_b = np.array([[0.9, 0.0, 0.0], [0.0, 0.0, 0.9], [NAN, NAN, NAN]])
    found = best_of_n(half_a, half_b)
    assert found.kept.tolist() == [0, 1]
    np.testing.assert_allclose(found.gain, [(-0.3 - 0.3) / 2, (0.6 + 0.4) / 2])
