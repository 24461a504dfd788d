"""Rewards: one number per candidate list from the scores that a text leads to, and how far it can be trusted.

Departs from the paper, which uses NDCG@5 only. Any metric of `core.metrics` may be the reward. So may the list
log-likelihood: it has no ties, so it also distinguishes samples that leave the top of the list in the same order. A list
without a positive gives NaN (no information) instead of 0. Ties, agreement between metrics and the carry-over show what a
reward is worth. The carry-over separates the true worth of a sample from the luck of being the best of N, and shrinkage
removes the part of the spread that is luck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dpo4rec_ray.core.intervals import Interval, ratio_bootstrap
from dpo4rec_ray.core.metrics import METRICS, check_lists, list_metrics, parse_metric
from dpo4rec_ray.errors import UserError

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]


def log_likelihood_reward(scores: Array, labels: Array, mask: Array | None = None) -> FloatArray:
    """Mean over the list's positives of log softmax(scores) at that positive (beyond the paper).

    The probability of a positive as the first choice of a Plackett-Luce model (Plackett, 1975) with these
    scores. scores, labels, mask: [B, L] -> [B]; NaN for a list without a positive.

    Raises:
        ValueError: shapes differ or a real candidate's score is NaN.
    """
    real = check_lists(scores, labels, mask)
    positive = (labels > 0) & real
    num_positive = positive.sum(axis=1)
    logits = np.where(real, scores.astype(np.float64), -np.inf)
    top = logits.max(axis=1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0.0)  # a wholly padded list has no largest score
    weights = np.exp(logits - top).sum(axis=1)
    log_total = top[:, 0] + np.log(np.where(weights > 0, weights, 1.0))
    at_positives = np.where(positive, logits, 0.0).sum(axis=1)
    mean = np.divide(at_positives, num_positive, out=np.full(len(logits), np.nan), where=num_positive > 0)
    return mean - log_total


# Rewards that are no ranking metric: scores, labels, mask [B, L] -> [B], NaN for a list without a positive.
_OF_SCORES: dict[str, Callable[[Array, Array, Array | None], FloatArray]] = {
    "log_likelihood": log_likelihood_reward
}

REWARDS = (*(f"{metric}@k" for metric in METRICS), *_OF_SCORES)  # k is any whole number from 1


def list_rewards(
    scores: Array, labels: Array, names: Sequence[str], mask: Array | None = None
) -> dict[str, FloatArray]:
    """Rewards of every list by name, from one ranking: scores, labels, mask [B, L] -> name -> [B].

    The paper's reward is "ndcg@5". NaN for a list without a positive, whatever the reward: no information, where the
    metric itself says 0. Ties and padding: as `core.metrics.list_metrics`.

    Raises:
        UserError: a name is neither "log_likelihood" nor a metric with its cut-off, such as "ndcg@5".
        ValueError: shapes differ or a real candidate's score is NaN.
    """
    for name in names:
        check_reward(name)
    real = check_lists(scores, labels, mask)
    has_positive = ((labels > 0) & real).any(axis=1)
    ranked = list_metrics(scores, labels, [name for name in names if name not in _OF_SCORES], mask)
    return {
        name: _OF_SCORES[name](scores, labels, mask)
        if name in _OF_SCORES
        else np.where(has_positive, ranked[name], np.nan)
        for name in names
    }


class TieRates(NamedTuple):
    """How often samples have the same reward: shares in 0..1, NaN when no user is left to count."""

    best: float  # of users: two or more samples share the best reward
    all: float  # of users: all samples have the same reward
    pairs: float  # of pairs of samples of one user: equal


def tie_rates(rewards: Array) -> TieRates:
    """How often a user's samples tie, so that only their order decides which one is chosen. rewards: [U, N].

    Equal means exactly equal, as it does when pairs are made. Users with a NaN are left out.

    Raises:
        ValueError: not [U, N] with N >= 2.
    """
    _check_samples(rewards)
    known = rewards[~np.isnan(rewards).any(axis=1)]
    if not len(known):
        return TieRates(float("nan"), float("nan"), float("nan"))
    ordered = np.sort(known, axis=1)
    num_samples = ordered.shape[1]
    # both (i, j) and (j, i), and every sample with itself
    num_equal = int((known[:, :, None] == known[:, None, :]).sum()) - known.size
    return TieRates(
        best=float((ordered[:, -1] == ordered[:, -2]).mean()),
        all=float((ordered[:, -1] == ordered[:, 0]).mean()),
        pairs=num_equal / (len(known) * num_samples * (num_samples - 1)),
    )


def rank_agreement(a: Array, b: Array) -> float:
    """Mean over users of the Spearman correlation of two rewards over the same samples. a, b: [U, N].

    Users with a NaN, and those whose samples all tie in a or in b (nothing is ordered), are left out; NaN if none is
    left. Tied samples share their mean rank.

    Raises:
        ValueError: shapes differ or are not [U, N] with N >= 2.
    """
    _check_samples(a)
    _check_alike(a, b)
    # Comparisons with NaN are False: a user with a NaN is left out as one who orders nothing.
    ordered = (a.max(axis=1) > a.min(axis=1)) & (b.max(axis=1) > b.min(axis=1))
    if not ordered.any():
        return float("nan")
    return float(_spearman(a[ordered].astype(np.float64), b[ordered].astype(np.float64)).mean())


def personal(plain: Array, others: Array) -> FloatArray:
    """The personal reward (beyond the paper): what a text is worth to its user beyond what it is worth to other users.

    A manner that helps every user cancels; what only this user's text can know is left. plain, others: the reward of the same
    samples for their user, and its mean over other users; of one shape. NaN where either is.

    Raises:
        ValueError: shapes differ.
    """
    _check_alike(plain, others)
    return plain.astype(np.float64) - others


def list_noise(std_errors: Array, num_lists: Array) -> float:
    """How far chance alone moves a sample's reward on one list: a standard deviation, pooled over users.

    A user's own standard error comes from few lists; if it is small by chance, shrinkage would trust a lucky reward. With the
    pooled noise, one sample's mean over n lists has the error noise / sqrt(n), also for a user with a single list.

    std_errors, num_lists: [U], NaN where unknown -> NaN if all are. Users weigh by their degrees of freedom, lists - 1.
    """
    known = ~np.isnan(std_errors) & (num_lists > 1)
    if not known.any():
        return float("nan")
    freedom = num_lists[known].astype(np.float64) - 1
    per_list = std_errors[known].astype(np.float64) ** 2 * num_lists[known]
    return float(np.sqrt((per_list * freedom).sum() / freedom.sum()))


@dataclass(frozen=True)
class Shrinkage:
    """How far rewards are pulled towards their user's mean by how little they can be trusted (empirical Bayes; beyond the paper).

    The best of N samples owes part of its lead to luck. With rewards = user's mean + t + e, var(t) = tau2 the same for
    all users and var(e) = std_error^2 of the user, the best guess of t is factor * (reward - user's mean), factor =
    tau2 / (tau2 + std_error^2) (Efron and Morris, 1975).

    The order of a user's samples never changes, so best and worst stay the same. Shrinkage matters only together with
    `pair.min_margin`, which is then compared with the part of the gap that can be expected to hold. If luck alone
    can explain the spread, tau2 is 0 and all samples of a user tie at the mean.
    """

    tau2: float
    unmeasured: float  # std_error^2 of a user without a standard error

    def __call__(self, rewards: Array, std_errors: Array) -> tuple[FloatArray, FloatArray]:
        """Shrunk rewards [U, N] and factors [U] in 0..1, from what `fit_shrinkage` takes.

        A user with a NaN among the rewards is left as it is, with factor NaN.

        Raises:
            ValueError: as `fit_shrinkage`.
        """
        known = _known_users(rewards, std_errors)
        shrunk = rewards.astype(np.float64)
        factors = np.full(len(rewards), np.nan)
        noise = np.where(np.isnan(std_errors), self.unmeasured, std_errors.astype(np.float64) ** 2)
        total = self.tau2 + noise[known]
        # Rewards without error and without spread keep their values.
        factors[known] = np.divide(self.tau2, total, out=np.ones_like(total), where=total > 0)
        mean = shrunk[known].mean(axis=1, keepdims=True)
        shrunk[known] = mean + factors[known, None] * (shrunk[known] - mean)
        return shrunk, factors


def fit_shrinkage(rewards: Array, std_errors: Array) -> Shrinkage:
    """The shrinkage of these users' rewards, by moments.

    tau2 is the mean over users of var(rewards, ddof=1) - std_error^2, at least 0.
    A user without a standard error (one list only, so luck and worth cannot be separated) gets the error that such users
    have on average, by the same moments: std_error^2 = mean over them of var(rewards) - tau2, at least 0. The standard
    errors of the others would be too small for them, since those come from more lists.

    Args:
        rewards: [U, N]. A user with a NaN is out of all means.
        std_errors: [U] standard error of one sample's reward relative to the user's other samples, from the pooled
            noise of `list_noise`; NaN where it is unknown.

    Raises:
        UserError: there are rewards, but no user with a standard error.
        ValueError: not [U, N] with N >= 2, or not one standard error >= 0 per user.
    """
    known = _known_users(rewards, std_errors)
    if not known.any():
        return Shrinkage(0.0, 0.0)
    measured = known & ~np.isnan(std_errors)
    if not measured.any():
        raise UserError(
            f"none of {int(known.sum())} users has a standard error of its rewards (that takes two lists with a positive): "
            "worth and luck cannot be separated; set pair.shrinkage = false"
        )
    spread = rewards.astype(np.float64).var(axis=1, ddof=1)
    noise = std_errors.astype(np.float64) ** 2
    tau2 = max(0.0, float((spread[measured] - noise[measured]).mean()))
    alone = spread[known & ~measured]
    return Shrinkage(tau2, max(0.0, float(alone.mean()) - tau2) if len(alone) else 0.0)


def shrink(rewards: Array, std_errors: Array) -> tuple[FloatArray, FloatArray]:
    """Rewards [U, N] shrunk by what they tell themselves, and the factors [U]: `fit_shrinkage` and its answer at once."""
    return fit_shrinkage(rewards, std_errors)(rewards, std_errors)


def _known_users(rewards: Array, std_errors: Array) -> npt.NDArray[np.bool_]:
    """Which users have all their rewards, bool [U]."""
    _check_samples(rewards)
    if std_errors.shape != rewards.shape[:1] or (std_errors < 0).any():
        raise ValueError(f"std_errors must be [{len(rewards)}] and not negative, got {std_errors.shape}")
    return ~np.asarray(np.isnan(rewards).any(axis=1))


@dataclass(frozen=True)
class CarryOver:
    """How far a choice among N samples holds on lists it was not made on; U' users without NaN."""

    gap_in_sample: FloatArray  # [U'] best minus worst, measured where they were chosen
    gap_held_out: FloatArray  # [U'] the same two samples, measured on the other half
    rank_correlation: FloatArray  # [U'] Spearman between the halves over the N samples
    kept: npt.NDArray[np.int64]  # [U'] rows of the input


def carry_over(
    half_a: Array, half_b: Array, measure_a: Array | None = None, measure_b: Array | None = None
) -> CarryOver:
    """Choose best and worst sample on one half of a user's lists, measure their gap on both (beyond the paper).

    The gaps are averaged over both directions. The rank correlation is that of the reward on one half with the measure
    on the other, averaged likewise. Users with a NaN in any of the arrays are dropped. Tied samples share their mean
    rank; a half in which all samples tie orders nothing and gives correlation 0.0.

    Args:
        half_a, half_b: [U, N] mean rewards of each sample on two disjoint halves of the user's lists.
        measure_a, measure_b: [U, N] another reward of the same samples on the same halves, by which the gaps are
            measured, so that the choices of different rewards compare in one unit. None: the reward itself.

    Raises:
        ValueError: shapes differ or are not [U, N] with N >= 1.
    """
    measure_a = half_a if measure_a is None else measure_a
    measure_b = half_b if measure_b is None else measure_b
    halves = (half_a, half_b, measure_a, measure_b)
    if half_a.ndim != 2 or half_a.shape[1] == 0 or any(half.shape != half_a.shape for half in halves):
        shapes = ", ".join(str(half.shape) for half in halves)
        raise ValueError(f"halves must share a shape [U, N], N >= 1, got {shapes}")
    kept = np.flatnonzero(~np.any([np.isnan(half).any(axis=1) for half in halves], axis=0))
    first, second, measure_first, measure_second = (half[kept].astype(np.float64) for half in halves)
    return CarryOver(
        gap_in_sample=(_gap(first, measure_first) + _gap(second, measure_second)) / 2,
        gap_held_out=(_gap(first, measure_second) + _gap(second, measure_first)) / 2,
        rank_correlation=(_spearman(first, measure_second) + _spearman(second, measure_first)) / 2,
        kept=kept.astype(np.int64),
    )


class ChosenTexts(NamedTuple):
    """What choosing the best of a user's N samples by reward gains over their mean; U' users without NaN."""

    gain: FloatArray  # [U'] measured on the lists that did not choose
    kept: npt.NDArray[np.int64]  # [U'] rows of the input


def best_of_n(half_a: Array, half_b: Array) -> ChosenTexts:
    """Choose the best sample on one half of a user's lists; its reward on the other half minus the mean of the user's samples.

    Averaged over both directions. half_a, half_b: [U, N] as `carry_over` takes them; of equals the first is chosen.

    Raises:
        ValueError: as `carry_over`.
    """
    kept = carry_over(half_a, half_b).kept
    first, second = (half[kept].astype(np.float64) for half in (half_a, half_b))

    def gained(choose_on: FloatArray, measure_on: FloatArray) -> FloatArray:
        best = np.take_along_axis(measure_on, choose_on.argmax(axis=1)[:, None], axis=1)[:, 0]
        return best - measure_on.mean(axis=1)

    return ChosenTexts((gained(first, second) + gained(second, first)) / 2, kept)


def carried_share(found: CarryOver) -> Interval:
    """The part of the best-worst gap that carries over: mean held-out gap over mean in-sample gap, with its interval.

    A ratio of means, not a mean of the users' ratios: there a user whose samples hardly differ would weigh as much as one
    whose samples do. 1 means that all of the gap holds, 0 that the choice was luck; NaN when every in-sample gap is 0.

    Raises:
        ValueError: no user, or an in-sample gap is negative (gaps measured by another reward have no such share).
    """
    return ratio_bootstrap(found.gap_held_out, found.gap_in_sample, np.arange(len(found.kept)))


def check_reward(name: str) -> None:
    """Raises UserError if no reward has this name; `REWARDS` lists them."""
    if name in _OF_SCORES:
        return
    try:
        parse_metric(name)
    except UserError:
        raise UserError(
            f"unknown reward '{name}'. Known: {', '.join(REWARDS)}, k a whole number from 1, e.g. 'ndcg@5'"
        ) from None


def _check_samples(rewards: Array) -> None:
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [U, N] with N >= 2 samples, got {rewards.shape}")


def _check_alike(a: Array, b: Array) -> None:
    if a.shape != b.shape:
        raise ValueError(f"both rewards must be of the same samples, got {a.shape} and {b.shape}")


def _gap(choose_on: FloatArray, measure_on: FloatArray) -> FloatArray:
    """measure_on at the best minus at the worst sample of choose_on, first on ties. [U, N] -> [U]."""
    best = np.take_along_axis(measure_on, choose_on.argmax(axis=1)[:, None], axis=1)
    worst = np.take_along_axis(measure_on, choose_on.argmin(axis=1)[:, None], axis=1)
    return (best - worst)[:, 0]


def _spearman(first: FloatArray, second: FloatArray) -> FloatArray:
    """Spearman correlation per row, 0.0 where a row is constant. [U, N] -> [U]."""
    x, y = _centred_ranks(first), _centred_ranks(second)
    scale = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    return np.divide((x * y).sum(axis=1), scale, out=np.zeros(len(x)), where=scale > 0)


def _centred_ranks(values: FloatArray) -> FloatArray:
    """Mean ranks minus their average, from the N x N comparisons of each row. [U, N] -> [U, N]."""
    above = (values[:, :, None] > values[:, None, :]).sum(axis=2)
    below = (values[:, :, None] < values[:, None, :]).sum(axis=2)
    return (above - below) / 2.0
