"""95 % intervals of means and ratios by the bootstrap, resampling whole groups: the paired bootstrap of two rankers.

Departs from the paper, which prints no intervals. A group is a user: a user's lists share one history and are not
independent, so users are drawn with all their lists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]

# Resampled group counts held in memory at once (float64: 32 MB).
_MAX_COUNTS_IN_MEMORY = 4_000_000


class Interval(NamedTuple):
    """A mean or ratio, its 95 % interval, and how surprising it would be if the true value were 0."""

    mean: float
    low: float
    high: float
    p_value: float


def signed(mean: float, ends: Sequence[float | None] | None) -> str:
    """A difference and its interval for people: "+0.0102 [+0.0040, +0.0160]"; ends that are not known are left out."""
    known = [end for end in ends or () if end is not None and not math.isnan(end)]
    return f"{mean:+.4f} [{known[0]:+.4f}, {known[1]:+.4f}]" if len(known) == 2 else f"{mean:+.4f}"


def paired_bootstrap(values: Array, groups: Array, num_resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of paired differences with a 95 % percentile interval, resampling whole groups with replacement.

    values: [n] differences, one per list (or sample); groups: [n] the user each belongs to. The statistic of a resample is
    the mean over all values of the drawn groups, so users with more lists weigh more, as in the mean. With a single group
    nothing can be resampled: low, high and p_value are NaN.

    Raises:
        ValueError: no values, shapes differ, or a value is not finite.
    """
    values, group_index = _check_groups("values", values, groups)
    sizes = np.bincount(group_index).astype(np.float64)  # [G]
    sums = np.bincount(group_index, weights=values)  # [G]
    (found,) = bootstrap_columns(sums[:, None], sizes, num_resamples, seed)
    return found._replace(mean=float(values.mean()))  # not from the sums, which differ in the last digits


def seeds_bootstrap(
    parts: Sequence[tuple[Array, Array]], num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean over independent parts (runs of several seeds) of each part's mean, with a 95 % percentile interval.

    parts: each as `paired_bootstrap` takes it: values [n], groups [n]. Every resample draws the groups of each part anew, within
    the part; parts weigh the same. With one part it is `paired_bootstrap`. The interval holds for these seeds: it says how far
    other users would move the mean, not other seeds.

    Raises:
        ValueError: no part, or as `paired_bootstrap`.
    """
    if not parts:
        raise ValueError("no part to take a mean of")
    means, resampled = np.empty(len(parts)), np.zeros((num_resamples, 1))
    rng = np.random.default_rng(seed)
    for place, (values, groups) in enumerate(parts):
        values, group_index = _check_groups("values", values, groups)
        sizes = np.bincount(group_index).astype(np.float64)
        means[place] = values.mean()
        if len(sizes) == 1:
            resampled[:] = np.nan
        sums = np.bincount(group_index, weights=values)
        resampled += _resampled(sums[:, None], sizes, num_resamples, rng) / len(parts)
    if np.isnan(resampled).any():
        return Interval(float(means.mean()), *[float("nan")] * 3)
    return _intervals(means.mean(keepdims=True), resampled)[0]


def ratio_bootstrap(
    numerators: Array, denominators: Array, groups: Array, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Ratio of two sums with a 95 % percentile interval, resampling whole groups with replacement.

    numerators, denominators, groups: [n]. The statistic of a resample is the sum of its numerators over the sum of its
    denominators. Denominators that are all 0 give NaN throughout; a single group gives NaN for all but the ratio.

    Raises:
        ValueError: no values, shapes differ, a value is not finite, or a denominator is negative (a ratio whose
            denominator may change its sign has no interval).
    """
    numerators, group_index = _check_groups("numerators", numerators, groups)
    denominators, _ = _check_groups("denominators", denominators, groups)
    if (denominators < 0).any():
        raise ValueError(f"{int((denominators < 0).sum())} of {denominators.size} denominators are negative")
    above = np.bincount(group_index, weights=numerators)  # [G]
    below = np.bincount(group_index, weights=denominators)  # [G]
    (found,) = bootstrap_columns(above[:, None], below, num_resamples, seed)
    return found


def proportion_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a proportion of `count` independent trials (Wilson, 1927); NaN without trials."""
    if not count:
        return float("nan"), float("nan")
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return float(middle - half), float(middle + half)


def bootstrap_columns(
    numerators: Array, denominators: Array, num_resamples: int, seed: int = 0
) -> list[Interval]:
    """Ratios of sums over groups with 95 % percentile intervals, of many columns at once: [G, C], [G] -> C intervals.

    A mean over lists is such a ratio: numerators are the sums over each group's lists, denominators their numbers. The
    groups are drawn once for all columns, since drawing takes nearly all the time. Resamples whose denominators sum to 0
    are left out. p_value: two-sided for a ratio of 0, 2 min((1 + #{ratios <= 0}) / (R + 1), (1 + #{ratios >= 0}) / (R + 1)),
    at most 1, of R resamples (the ratio itself counts as one more: Davison and Hinkley, 1997, chapter 4). With a single
    group low, high and p_value are NaN; with denominators that sum to 0 all is NaN.

    Raises:
        ValueError: a numerator is not finite.
    """
    num_bad = int((~np.isfinite(numerators)).sum())
    if num_bad:
        raise ValueError(f"{num_bad} of {numerators.size} sums are not finite: a ranker has diverged")
    nan, num_groups, total = float("nan"), len(denominators), float(denominators.sum())
    ratios = numerators.sum(axis=0) / total if total else np.full(numerators.shape[1], nan)
    if num_groups == 1 or not total:
        return [Interval(float(ratio), nan, nan, nan) for ratio in ratios]
    resampled = _resampled(numerators, denominators, num_resamples, np.random.default_rng(seed))
    return _intervals(ratios, resampled[~np.isnan(resampled[:, 0])])


def _resampled(
    numerators: Array, denominators: Array, num_resamples: int, rng: np.random.Generator
) -> FloatArray:
    """Ratios of sums over resampled groups, [R, C]; NaN where a resample's denominators sum to 0."""
    num_groups = len(denominators)
    shares = np.full(num_groups, 1.0 / num_groups)
    resampled = np.empty((num_resamples, numerators.shape[1]))
    below = np.empty((num_resamples, 1))
    chunk = max(1, _MAX_COUNTS_IN_MEMORY // num_groups)
    for start in range(0, num_resamples, chunk):
        part = slice(start, min(start + chunk, num_resamples))
        counts = rng.multinomial(num_groups, shares, size=part.stop - start).astype(np.float64)  # [R, G]
        resampled[part], below[part, 0] = counts @ numerators, counts @ denominators
    return np.divide(resampled, below, out=np.full_like(resampled, np.nan), where=below > 0)


def _intervals(ratios: Array, resampled: FloatArray) -> list[Interval]:
    """ratios [C] with the ends of their intervals and p-values, from their resamples [R, C]."""
    lows, highs = np.percentile(resampled, [2.5, 97.5], axis=0)
    rarer_side = np.minimum((resampled <= 0).sum(axis=0), (resampled >= 0).sum(axis=0))
    p_values = np.minimum(1.0, 2 * (1 + rarer_side) / (len(resampled) + 1))
    return [Interval(*map(float, row)) for row in zip(ratios, lows, highs, p_values, strict=True)]


def clustered_std_error(values: Array, groups: Array) -> float:
    """Standard error of the mean of values [n] whose groups [n] are independent, not they themselves; NaN with one group.

    sqrt(G / (G - 1) sum_g (sum of group g's deviations from the mean)^2) / n (Liang and Zeger, 1986).

    Raises:
        ValueError: as `paired_bootstrap`.
    """
    values, group_index = _check_groups("values", values, groups)
    sums = np.bincount(group_index, weights=values - values.mean())
    if len(sums) < 2:
        return float("nan")
    return float(np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(values))


def _check_groups(what: str, values: Array, groups: Array) -> tuple[FloatArray, npt.NDArray[np.intp]]:
    """The values in float64 and the number of each one's group, 0..G-1."""
    values, groups = np.asarray(values, dtype=np.float64), np.asarray(groups)
    if values.ndim != 1 or values.shape != groups.shape or values.size == 0:
        raise ValueError(f"{what} and groups must be [n] with n >= 1, got {values.shape} and {groups.shape}")
    if not np.isfinite(values).all():
        num_bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"{num_bad} of {values.size} {what} are not finite: drop them first")
    return values, np.unique(groups, return_inverse=True)[1]
