"""Ranking metrics per candidate list, and the paired bootstrap that compares two rankers.

Departs from the paper: two MAPs, both named (the paper prints only the one called `map_paper` here), MRR and HR beside
them, and an interval clustered by user, because a user's lists share one history and are not independent. Lists are
ranked once, for the largest cut-off; every metric at every cut-off is read from the ranked labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from dpo4rec_ray.errors import UserError

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]

# Candidates ranked at once: bounds the memory (some 8 MB per array) and keeps it in the cache.
_MAX_CANDIDATES_AT_ONCE = 1_000_000
# Resampled group counts held in memory at once by the bootstrap (float64: 32 MB).
_MAX_COUNTS_IN_MEMORY = 4_000_000


class Metric(Protocol):
    """A metric with a fixed cut-off: scores, labels [B, L] -> [B]."""

    def __call__(self, scores: Array, labels: Array, mask: Array | None = None) -> FloatArray: ...


class Interval(NamedTuple):
    """A figure, its 95 % interval, and how surprising it would be if the truth were 0."""

    mean: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class RankedLists:
    """B lists in rank order down to rank K, the largest cut-off or the whole list; all that a metric may look at."""

    ranked: FloatArray  # [B, K] labels in rank order; padding ranks last, with label 0.0
    labels: FloatArray  # [B, L] labels in candidate order, padding as 0.0

    @cached_property
    def hits(self) -> npt.NDArray[np.int64]:
        """[B, K] relevant candidates among the first 1, 2, ... K ranks; relevant is label > 0."""
        return np.cumsum(self.ranked > 0, axis=1, dtype=np.int64)

    @cached_property
    def precision_sum(self) -> FloatArray:
        """[B, K] precision at each hit, summed over the first 1, 2, ... K ranks."""
        precision = self.hits / np.arange(1.0, self.ranked.shape[1] + 1)
        return np.cumsum(np.where(self.ranked > 0, precision, 0.0), axis=1)


# Every metric gives all cut-offs at once: [B, K], column k - 1 for cut-off k. Lists without a relevant item score 0.0 and
# count in the mean; ties keep candidate order; padding is never counted.


def ndcg(lists: RankedLists) -> FloatArray:
    """NDCG with gain 2^label - 1 and log2 discount (Burges et al., 2005) at k = 1..K. -> [B, K]."""
    num_ranks = lists.ranked.shape[1]
    discount = 1.0 / np.log2(np.arange(2.0, num_ranks + 2))
    ideal: FloatArray = -np.sort(-lists.labels, axis=1)[:, :num_ranks]
    dcg = np.cumsum((np.exp2(lists.ranked) - 1.0) * discount, axis=1)
    ideal_dcg = np.cumsum((np.exp2(ideal) - 1.0) * discount, axis=1)
    return _divide(dcg, ideal_dcg)


def map_paper(lists: RankedLists) -> FloatArray:
    """Average precision at k = 1..K, divided by the hits found in the top k. -> [B, K].

    KAR's MAP (arXiv 2306.10933, public code), which the paper reports. Relevant items left below rank k cost
    nothing, so it is never below `map_plain`.
    """
    return _divide(lists.precision_sum, lists.hits)


def map_plain(lists: RankedLists) -> FloatArray:
    """Average precision at k = 1..K, divided by min(k, number of relevant). -> [B, K].

    A perfect ranking scores 1.0 even when more than k candidates are relevant. (trec_eval's map_cut.k and ranx's
    map@k divide by the number of relevant items instead: the same figure unless that exceeds k.)
    """
    num_relevant = (lists.labels > 0).sum(axis=1)
    cut = np.arange(1, lists.ranked.shape[1] + 1)
    return _divide(lists.precision_sum, np.minimum(num_relevant[:, None], cut))


def mrr(lists: RankedLists) -> FloatArray:
    """Reciprocal rank of the first relevant item, 0.0 when it is not in the top k, at k = 1..K. -> [B, K]."""
    first = (lists.hits == 1) & (lists.ranked > 0)
    return np.cumsum(first / np.arange(1.0, lists.ranked.shape[1] + 1), axis=1)


def hit_rate(lists: RankedLists) -> FloatArray:
    """1.0 when a relevant item is in the top k, else 0.0, at k = 1..K. -> [B, K]."""
    return (lists.hits > 0).astype(np.float64)


METRICS: dict[str, Callable[[RankedLists], FloatArray]] = {
    "ndcg": ndcg,
    "map_paper": map_paper,
    "map": map_plain,
    "mrr": mrr,
    "hr": hit_rate,
}


def list_metrics(
    scores: Array, labels: Array, names: Sequence[str], mask: Array | None = None
) -> dict[str, FloatArray]:
    """Metrics called e.g. "ndcg@5" of every list, from one ranking: scores, labels, mask [B, L] -> name -> [B].

    Ties keep candidate order. Places where `mask` is False are padding: ranked below every real candidate and never
    counted. A cut-off beyond the list's length means the whole list.

    Raises:
        UserError: a name is not "<metric>@<k>" with a metric of `METRICS` and k >= 1.
        ValueError: shapes differ, or a real candidate's score is NaN.
    """
    wanted = {name: _parse(name) for name in names}
    real = check_lists(scores, labels, mask)
    num_lists, length = scores.shape
    found = {name: np.zeros(num_lists) for name in wanted}
    if not wanted or not length:
        return found
    num_ranks = min(max(k for _, k in wanted.values()), length)
    num_at_once = max(1, _MAX_CANDIDATES_AT_ONCE // length)
    for start in range(0, num_lists, num_at_once):
        part = slice(start, start + num_at_once)
        lists = _rank(scores[part], labels[part], real[part], num_ranks)
        curves = {base: METRICS[base](lists) for base in {base for base, _ in wanted.values()}}
        for name, (base, k) in wanted.items():
            found[name][part] = curves[base][:, min(k, length) - 1]
    return found


def metric_by_name(name: str) -> Metric:
    """The metric called e.g. "ndcg@5": (scores, labels, mask=None) -> [B]; `list_metrics` of this one name.

    Raises:
        UserError: the name is not "<metric>@<k>" with a metric of `METRICS` and k >= 1.
    """
    _parse(name)

    def metric(scores: Array, labels: Array, mask: Array | None = None) -> FloatArray:
        return list_metrics(scores, labels, [name], mask)[name]

    return metric


def paired_bootstrap(values: Array, groups: Array, num_resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of paired differences with a 95 % percentile interval, resampling whole groups with replacement.

    values: [n] differences, one per list (or sample); groups: [n] the user each belongs to. The statistic of
    a resample is the mean over all values of the drawn groups, so users with more lists weigh more, as in the
    mean. p_value: two-sided, 2 min((1 + #{means <= 0}) / (R + 1), (1 + #{means >= 0}) / (R + 1)), at most 1, of R
    resamples (the figure itself counts as one more: Davison and Hinkley, 1997, chapter 4). With a single
    group nothing can be resampled: low, high and p_value are NaN.

    Raises:
        ValueError: no values, shapes differ, or a value is not finite.
    """
    values, group_index = _check_groups("values", values, groups)
    sizes = np.bincount(group_index).astype(np.float64)  # [G]
    sums = np.bincount(group_index, weights=values)  # [G]
    return _interval(float(values.mean()), sums, sizes, num_resamples, seed)


def ratio_bootstrap(
    numerators: Array, denominators: Array, groups: Array, num_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Ratio of two sums with a 95 % percentile interval, resampling whole groups with replacement.

    numerators, denominators, groups: [n]. The statistic of a resample is the sum of its numerators over the sum of its
    denominators; resamples whose denominators are all 0 have none and are left out. p_value: two-sided for a ratio of
    0, as in `paired_bootstrap`. Denominators that are all 0 give NaN throughout, a single group NaN but for the ratio.

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
    total = float(below.sum())
    ratio = float(above.sum()) / total if total else float("nan")
    return _interval(ratio, above, below, num_resamples, seed)


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


def _parse(name: str) -> tuple[str, int]:
    """("ndcg", 5) of "ndcg@5"."""
    base, _, cut = name.partition("@")
    if base not in METRICS or not (cut.isascii() and cut.isdigit()) or int(cut) < 1:
        known = ", ".join(f"{metric}@k" for metric in METRICS)
        raise UserError(f"unknown metric '{name}'. Known: {known}, k a whole number from 1, e.g. 'ndcg@5'")
    return base, int(cut)


def _rank(scores: Array, labels: Array, real: npt.NDArray[np.bool_], num_ranks: int) -> RankedLists:
    # NaN sorts after everything, so padding stays below a real candidate that scores -inf.
    key = np.where(real, -scores.astype(np.float64), np.nan)
    order = np.argsort(key, axis=1, kind="stable")[:, :num_ranks]
    known = np.where(real, labels.astype(np.float64), 0.0)
    return RankedLists(np.take_along_axis(known, order, axis=1), known)


def _divide(above: FloatArray, below: Array) -> FloatArray:
    """above / below, 0.0 where below is 0."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _check_groups(what: str, values: Array, groups: Array) -> tuple[FloatArray, npt.NDArray[np.intp]]:
    """The values in float64 and the number of each one's group, 0..G-1."""
    values, groups = np.asarray(values, dtype=np.float64), np.asarray(groups)
    if values.ndim != 1 or values.shape != groups.shape or values.size == 0:
        raise ValueError(f"{what} and groups must be [n] with n >= 1, got {values.shape} and {groups.shape}")
    if not np.isfinite(values).all():
        num_bad = int((~np.isfinite(values)).sum())
        raise ValueError(f"{num_bad} of {values.size} {what} are not finite: drop them first")
    return values, np.unique(groups, return_inverse=True)[1]


def _interval(figure: float, above: Array, below: Array, num_resamples: int, seed: int) -> Interval:
    """The figure sum(above) / sum(below) with what resampling the groups says about it. above, below: [G]."""
    num_groups = len(above)
    if num_groups == 1 or not below.any():
        return Interval(figure, float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    shares = np.full(num_groups, 1.0 / num_groups)
    resampled = np.empty((2, num_resamples))
    chunk = max(1, _MAX_COUNTS_IN_MEMORY // num_groups)
    for start in range(0, num_resamples, chunk):
        part = slice(start, min(start + chunk, num_resamples))
        counts = rng.multinomial(num_groups, shares, size=part.stop - start).astype(np.float64)  # [R, G]
        resampled[:, part] = counts @ above, counts @ below
    has_figure = resampled[1] > 0
    figures = resampled[0, has_figure] / resampled[1, has_figure]
    low, high = np.percentile(figures, [2.5, 97.5])
    rarer_side = min(int((figures <= 0).sum()), int((figures >= 0).sum()))
    p_value = min(1.0, 2 * (1 + rarer_side) / (len(figures) + 1))
    return Interval(figure, float(low), float(high), p_value)
