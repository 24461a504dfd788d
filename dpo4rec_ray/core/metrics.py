"""Ranking metrics per candidate list.

Departs from the paper: two MAPs, each with its own name (the paper prints only the one called `map_paper` here), and MRR
and HR beside them. Lists are ranked once, for the largest cut-off; every metric at every cut-off is read from the ranked
labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo4rec_ray.errors import UserError

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]

# Candidates ranked at once: bounds the memory (some 8 MB per array) and keeps it in the cache.
_MAX_CANDIDATES_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class RankedLists:
    """B lists in rank order down to rank K, the largest cut-off or the whole list; the only input of a metric."""

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
    map@k divide by the number of relevant items instead: the same value unless that exceeds k.)
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
    wanted = {name: parse_metric(name) for name in names}
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


def parse_metric(name: str) -> tuple[str, int]:
    """("ndcg", 5) of "ndcg@5". Raises UserError for any other form than "<metric>@<k>" with a metric of `METRICS`, k >= 1."""
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
