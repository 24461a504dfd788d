from __future__ import annotations

import math

import numpy as np
import pytest

from dpo4rec_ray.core.intervals import (
    clustered_std_error,
    paired_bootstrap,
    proportion_interval,
    ratio_bootstrap,
    seeds_bootstrap,
)


def test_bootstrap_of_equal_values_has_no_width() -> None:
    """Every resample of a constant has the same mean. None of 200 is <= 0: p = 2 (1 + 0) / 201."""
    interval = paired_bootstrap(np.full(12, 0.25), np.arange(12) % 4, num_resamples=200)
    assert interval == pytest.approx((0.25, 0.25, 0.25, 2 / 201))
    assert paired_bootstrap(np.full(12, -0.25), np.arange(12), num_resamples=200).p_value == 2 / 201
    assert paired_bootstrap(np.zeros(12), np.arange(12), num_resamples=200) == (0.0, 0.0, 0.0, 1.0)


def test_bootstrap_weighs_users_by_their_lists() -> None:
    """User 7 has values 0 0 0, user 9 has 1.

    Resamples: {7,7} -> 0, {7,9} -> 1/4, {9,9} -> 1 with chances 1/4, 1/2, 1/4. So the 2.5 % and 97.5 %
    percentiles are 0 and 1 and the mean over all four values is .25. A quarter of the resamples is <= 0, all are >= 0:
    p = 2 / 4.
    """
    interval = paired_bootstrap(np.array([0.0, 1.0, 0.0, 0.0]), np.array([7, 9, 7, 7]))
    assert interval[:3] == (0.25, 0.0, 1.0)
    assert interval.p_value == pytest.approx(0.5, abs=0.09)  # 4.5 standard deviations of 2,000 resamples


def test_bootstrap_p_value_matches_the_normal_test() -> None:
    """400 independent values with mean 1.5 standard errors above 0: the two-sided normal test says .1336.

    The resampled means are normal around the mean with that standard error, so the same share of them lies below 0.
    """
    values = np.random.default_rng(4).normal(size=400)
    values = (values - values.mean()) / values.std() + 1.5 / 20
    for sign in (1, -1):
        interval = paired_bootstrap(sign * values, np.arange(400), num_resamples=20_000)
        assert interval.p_value == pytest.approx(math.erfc(1.5 / math.sqrt(2)), abs=0.015)


def test_bootstrap_interval_matches_theory_when_groups_are_single() -> None:
    """400 independent normal values: the half width is near 1.96 / sqrt(400) = .098."""
    values = np.random.default_rng(1).normal(size=400)
    interval = paired_bootstrap(values, np.arange(400), num_resamples=4000)
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.08)


def test_bootstrap_clusters() -> None:
    """Each user's value repeated 25 times adds no information: the interval is that of the users alone."""
    values = np.random.default_rng(2).normal(size=40)
    alone = paired_bootstrap(values, np.arange(40))
    repeated = paired_bootstrap(np.repeat(values, 25), np.repeat(np.arange(40), 25))
    assert repeated == pytest.approx(alone)


def test_bootstrap_seed_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed gives the same interval, also when the resamples do not fit in memory at once."""
    rng = np.random.default_rng(3)
    values, groups = rng.normal(size=90), rng.integers(0, 30, 90)
    whole = paired_bootstrap(values, groups, seed=5)
    assert paired_bootstrap(values, groups, seed=5) == whole
    assert paired_bootstrap(values, groups, seed=6) != whole
    monkeypatch.setattr("dpo4rec_ray.core.intervals._MAX_COUNTS_IN_MEMORY", 100)
    assert paired_bootstrap(values, groups, seed=5) == pytest.approx(whole)


def test_bootstrap_edges() -> None:
    """One user cannot be resampled: NaN bounds. NaN values and missing values are errors."""
    mean, *rest = paired_bootstrap(np.array([0.0, 1.0]), np.array([4, 4]))
    assert mean == 0.5
    assert np.isnan(rest).all() and len(rest) == 3
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        paired_bootstrap(np.array([0.0, np.nan]), np.array([1, 2]))
    with pytest.raises(ValueError, match="n >= 1"):
        paired_bootstrap(np.array([]), np.array([]))
    with pytest.raises(ValueError, match="n >= 1"):
        paired_bootstrap(np.zeros(2), np.zeros(3))


def test_ratio_by_hand() -> None:
    """Group 1 has 3 / 6 and 1 / 2, group 2 has 0 / 2: 4 / 10, not the mean of the ratios.

    Resamples: {1,1} -> 8/16, {1,2} -> 4/10, {2,2} -> 0/4 with chances 1/4, 1/2, 1/4: the 95 % interval is 0 to .5. A
    quarter of the resamples is <= 0: p = .5.
    """
    interval = ratio_bootstrap(np.array([3.0, 0, 1]), np.array([6.0, 2, 2]), np.array([1, 2, 1]))
    assert interval[:3] == (0.4, 0.0, 0.5)
    assert interval.p_value == pytest.approx(0.5, abs=0.09)


def test_ratio_of_counts_is_the_mean() -> None:
    """With 1 below every value the ratio is the mean of the values, interval and p-value included."""
    rng = np.random.default_rng(5)
    values, groups = rng.normal(0.2, 1, 80), rng.integers(0, 30, 80)
    assert ratio_bootstrap(values, np.ones(80), groups) == pytest.approx(paired_bootstrap(values, groups))


def test_ratio_interval_covers() -> None:
    """100 data sets of 60 users whose true ratio is 1/4: the 95 % interval holds it in 86 to 100 of them.

    Per user the denominator is 1 to 3 and the numerator a quarter of it plus noise. 86 is 4 standard deviations below 95.
    """
    rng = np.random.default_rng(6)
    held = 0
    for _ in range(100):
        below = rng.uniform(1, 3, 60)
        above = below / 4 + rng.normal(0, 1, 60)
        interval = ratio_bootstrap(above, below, np.arange(60), num_resamples=500)
        held += interval.low <= 0.25 <= interval.high
    assert held >= 86


def test_ratio_without_a_denominator() -> None:
    """Resamples of group 2 alone (a quarter) divide by 0 and are left out; nothing to divide by at all is NaN."""
    interval = ratio_bootstrap(
        np.array([1.0, 0.0]), np.array([2.0, 0.0]), np.array([1, 2]), num_resamples=400
    )
    assert interval[:3] == (0.5, 0.5, 0.5)
    assert 2 / 401 < interval.p_value < 2 / 250  # 2 / (number kept + 1)
    assert np.isnan(ratio_bootstrap(np.array([1.0, 2.0]), np.zeros(2), np.array([1, 2]))).all()
    ratio, *rest = ratio_bootstrap(np.array([1.0, 2.0]), np.array([4.0, 2.0]), np.array([1, 1]))
    assert ratio == 0.5 and np.isnan(rest).all()


def test_ratio_mistakes() -> None:
    groups = np.array([1, 2])
    with pytest.raises(ValueError, match="1 of 2 denominators are negative"):
        ratio_bootstrap(np.ones(2), np.array([1.0, -1.0]), groups)
    with pytest.raises(ValueError, match="1 of 2 numerators are not finite"):
        ratio_bootstrap(np.array([1.0, np.nan]), np.ones(2), groups)
    with pytest.raises(ValueError, match="denominators and groups must be"):
        ratio_bootstrap(np.ones(2), np.ones(3), groups)


def test_proportion_interval_by_hand() -> None:
    """Wilson's interval of 8 of 10: middle (.8 + .19207) / 1.38415, half 1.41600 * sqrt(.016 + .0096036)."""
    assert proportion_interval(0.8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    assert proportion_interval(1.0, 4) == pytest.approx((4 / (4 + 1.959964**2), 1.0))
    assert np.isnan(proportion_interval(0.5, 0)).all()


def test_clustered_standard_error_of_single_groups_is_the_usual_one() -> None:
    values = np.array([1.0, 2.0, 4.0, 5.0])  # deviations -2 -1 1 2: sqrt(10 / 3) / sqrt(4)
    assert clustered_std_error(values, np.array([7, 1, 5, 3])) == pytest.approx(math.sqrt(10 / 3) / 2)


def test_clustered_standard_error_adds_up_what_a_group_shares() -> None:
    """Deviations of users 1 and 2 add up to 3 and -3: sqrt(2 / 1 (9 + 9)) / 4. If a user's deviations cancel, nothing is left."""
    values = np.array([1.0, 2.0, 4.0, 5.0])
    assert clustered_std_error(values, np.array([1, 1, 2, 2])) == pytest.approx(1.5)
    assert clustered_std_error(values, np.array([1, 2, 2, 1])) == pytest.approx(0.0)
    assert math.isnan(clustered_std_error(values, np.ones(4)))


def test_clustered_standard_error_agrees_with_the_bootstrap() -> None:
    """Users of 1 to 12 lists, whose lists share half of their variance."""
    rng = np.random.default_rng(6)
    groups = np.repeat(np.arange(150), rng.integers(1, 13, 150))
    values = rng.normal(size=150)[groups] + rng.normal(size=len(groups))
    interval = paired_bootstrap(values, groups, num_resamples=8000)
    error = clustered_std_error(values, groups)
    assert (interval.high - interval.low) / 2 / 1.96 == pytest.approx(error, rel=0.05)
    assert error > 1.5 * values.std() / math.sqrt(len(values)), "lists of one user are not independent"


def test_clustered_standard_error_refuses_what_has_none() -> None:
    with pytest.raises(ValueError, match="not finite"):
        clustered_std_error(np.array([0.1, np.nan]), np.array([0, 1]))
    with pytest.raises(ValueError, match="n >= 1"):
        clustered_std_error(np.array([]), np.array([]))


def test_one_seed_is_the_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    values, users = rng.normal(size=50), rng.integers(0, 12, 50)
    assert seeds_bootstrap([(values, users)]) == pytest.approx(paired_bootstrap(values, users))


def test_seeds_weigh_the_same_and_are_resampled_within() -> None:
    """100 users with mean 1 and 400 with mean 3: mean 2. Its standard error is sqrt(s1^2 / 100 + s2^2 / 400) / 2; the seeds'
    distance is no part of it. Normal values with s1 = 1 and s2 = 2: sqrt(.01 + .01) / 2 = .0707, so the interval is +- .139."""
    rng = np.random.default_rng(0)
    parts = []
    for count, mean, spread in ((100, 1.0, 1.0), (400, 3.0, 2.0)):
        values = rng.normal(size=count)
        parts.append((mean + spread * (values - values.mean()) / values.std(), np.arange(count)))
    found = seeds_bootstrap(parts, num_resamples=4000)
    assert found.mean == pytest.approx(2.0)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 0.0707, rel=0.06)
    one_user = seeds_bootstrap([parts[0], (np.array([1.0]), np.array([5]))])
    assert one_user.mean == pytest.approx(1.0) and math.isnan(one_user.low)
    with pytest.raises(ValueError, match="no part"):
        seeds_bootstrap([])
