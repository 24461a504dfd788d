"""Ranking metrics per candidate list, and the paired bootstrap that compares two rankers.

Departs from the paper: two MAPs, both named (the paper prints only the one called `map_paper` here), and an
interval clustered by user, because a user's lists share one history and are not independent. All lists of a
batch are ranked at once: 100,000 lists of 10 take a fraction of a second.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from dpo4rec_ray.errors import UserError

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]

# Resampled group counts held in memory at once by the bootstrap (float64: 32 MB).
_MAX_COUNTS_IN_MEMORY = 4_000_000


class MetricAtK(Protocol):
    """A metric with its cut-off still open: scores, labels [B, L] -> [B]."""

    def __call__(self, scores: Array, labels: Array, k: int, mask: Array | None = None) -> FloatArray: ...


class Metric(Protocol):
    """A metric with a fixed cut-off: scores, labels [B, L] -> [B]."""

    def __call__(self, scores: Array, labels: Array, mask: Array | None = None) -> FloatArray: ...


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def ndcg_at_k(scores: Array, labels: Array, k: int, mask: Array | None = None) -> FloatArray:
    """NDCG with gain 2^label - 1 and log2 discount (Burges et al., 2005).

    scores, labels, mask: [B, L] -> [B]. Ties keep candidate order. A list with no relevant item scores 0.0
    and counts in the mean. Places where `mask` is False are padding: ranked below every real candidate and
    never counted.

    Raises:
        ValueError: shapes differ, k < 1, or a real candidate's score is NaN.
    """
    known, ranked = _rank(scores, labels, k, mask)
    ideal: FloatArray = -np.sort(-known, axis=1)[:, :k]
    ranks = np.arange(1, ranked.shape[1] + 1, dtype=np.float64)  # [min(k, L)]
    discount = 1.0 / np.log2(ranks + 1)
    dcg: FloatArray = (np.exp2(ranked) - 1.0) @ discount
    ideal_dcg: FloatArray = (np.exp2(ideal) - 1.0) @ discount
    return np.divide(dcg, ideal_dcg, out=np.zeros_like(dcg), where=ideal_dcg > 0)


def map_at_k(scores: Array, labels: Array, k: int, mask: Array | None = None) -> FloatArray:
    """Average precision at k, divided by min(k, number of relevant).

    scores, labels, mask: [B, L] -> [B]. A perfect ranking scores 1.0 even when more than k candidates are
    relevant. (trec_eval's map_cut.k and ranx's map@k divide by the number of relevant items instead: the same
    figure unless that exceeds k.) Relevant is label > 0. Ties, padding, lists without a relevant item and
    errors: as `ndcg_at_k`.
    """
    known, ranked = _rank(scores, labels, k, mask)
    num_relevant = (known > 0).sum(axis=1)
    return _divide_precision_sum(ranked, np.minimum(num_relevant, k))


def map_paper_at_k(scores: Array, labels: Array, k: int, mask: Array | None = None) -> FloatArray:
    """Average precision at k, divided by the hits found in the top k.

    scores, labels, mask: [B, L] -> [B]. KAR's MAP (arXiv 2306.10933, public code), which the paper reports.
    Relevant items left below rank k cost nothing, so it is never below `map_at_k`. Relevant is label > 0.
    Ties, padding, lists without a hit (0.0) and errors: as `ndcg_at_k`.
    """
    _, ranked = _rank(scores, labels, k, mask)
    return _divide_precision_sum(ranked, (ranked > 0).sum(axis=1))


METRICS: dict[str, MetricAtK] = {"ndcg": ndcg_at_k, "map": map_at_k, "map_paper": map_paper_at_k}


def metric_by_name(name: str) -> Metric:
    """The metric called e.g. "ndcg@5": (scores, labels, mask=None) -> [B].

    Raises:
        UserError: the name is not "<metric>@<k>" with a metric of `METRICS` and k >= 1.
    """
    base, _, cut = name.partition("@")
    if base not in METRICS or not (cut.isascii() and cut.isdigit()) or int(cut) < 1:
        known = ", ".join(f"{metric}@k" for metric in METRICS)
        raise UserError(f"unknown metric '{name}'. Known: {known}, k a whole number from 1, e.g. 'ndcg@5'")
    metric_at_k, k = METRICS[base], int(cut)

    def metric(scores: Array, labels: Array, mask: Array | None = None) -> FloatArray:
        return metric_at_k(scores, labels, k, mask)

    return metric


def paired_bootstrap(values: Array, groups: Array, num_resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of paired differences with a 95 % percentile interval, resampling whole groups with replacement.

    values: [n] differences, one per list (or sample); groups: [n] the user each belongs to. The statistic of
    a resample is the mean over all values of the drawn groups, so users with more lists weigh more, as in the
    mean. With a single group nothing can be resampled: low and high are NaN.

    Raises:
        ValueError: no values, shapes differ, or a value is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    groups = np.asarray(groups)
    if values.ndim != 1 or values.shape != groups.shape or values.size == 0:
        raise ValueError(f"values and groups must be [n] with n >= 1, got {values.shape} and {groups.shape}")
    if not np.isfinite(values).all():
        num_bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"{num_bad} of {values.size} values are not finite: drop them first")
    _, group_index = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group_index).astype(np.float64)  # [G]
    sums = np.bincount(group_index, weights=values)  # [G]
    mean = float(values.mean())
    num_groups = len(sizes)
    if num_groups == 1:
        return Interval(mean, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    shares = np.full(num_groups, 1.0 / num_groups)
    means = np.empty(num_resamples)
    chunk = max(1, _MAX_COUNTS_IN_MEMORY // num_groups)
    for start in range(0, num_resamples, chunk):
        stop = min(start + chunk, num_resamples)
        counts = rng.multinomial(num_groups, shares, size=stop - start).astype(np.float64)  # [R, G]
        means[start:stop] = (counts @ sums) / (counts @ sizes)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(mean, float(low), float(high))


def check_lists(scores: Array, labels: Array, mask: Array | None) -> npt.NDArray[np.bool_]:
    """The mask [B, L], all True when None was given, after checking the three arrays against each other.

    Raises:
        ValueError: shapes differ or are not [B, L], or a real candidate's score is NaN (a NaN would silently
            rank last).
    """
    if scores.ndim != 2 or scores.shape != labels.shape or (mask is not None and mask.shape != scores.shape):
        shapes = f"scores {scores.shape}, labels {labels.shape}, mask {None if mask is None else mask.shape}"
        raise ValueError(f"scores, labels and mask must share one shape [B, L], got {shapes}")
    real = np.ones(scores.shape, dtype=np.bool_) if mask is None else mask.astype(np.bool_)
    num_nan = int((np.isnan(scores) & real).sum())
    if num_nan:
        raise ValueError(f"{num_nan} of {int(real.sum())} scores are NaN: the ranker has diverged")
    return real


def _rank(scores: Array, labels: Array, k: int, mask: Array | None) -> tuple[FloatArray, FloatArray]:
    """Labels, padding as 0.0 [B, L], and those of the top k in rank order [B, min(k, L)]; both float64."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    real = check_lists(scores, labels, mask)
    # NaN sorts after everything, so padding stays below a real candidate that scores -inf.
    key = np.where(real, -scores.astype(np.float64), np.nan)
    order = np.argsort(key, axis=1, kind="stable")[:, :k]
    known = np.where(real, labels.astype(np.float64), 0.0)
    return known, np.take_along_axis(known, order, axis=1)


def _divide_precision_sum(ranked: FloatArray, divisor: Array) -> FloatArray:
    """Precision at each hit among `ranked` [B, k], summed, over divisor [B]; 0.0 where that is 0. -> [B]."""
    hits = ranked > 0
    precision: FloatArray = np.cumsum(hits, axis=1) / np.arange(1.0, ranked.shape[1] + 1)
    total: FloatArray = (precision * hits).sum(axis=1)
    return np.divide(total, divisor, out=np.zeros_like(total), where=divisor > 0)
