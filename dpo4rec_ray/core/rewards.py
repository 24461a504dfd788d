"""Rewards: one number per candidate list under a sample's scores, and whether they carry over to other lists.

Departs from the paper, which knows NDCG@5 only: the list log-likelihood has no ties, so it tells apart
samples that leave the top of the list in the same order; a list without a positive is NaN (no information)
instead of 0; and the carry-over separates what a sample is worth from the luck of being the best of N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo4rec_ray.core.metrics import Metric, check_lists, ndcg_at_k

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]


def ndcg_reward(scores: Array, labels: Array, mask: Array | None = None) -> FloatArray:
    """NDCG@5 per list, the paper's reward. scores, labels, mask: [B, L] -> [B]; NaN without a positive.

    Raises:
        ValueError: shapes differ or a real candidate's score is NaN.
    """
    real = check_lists(scores, labels, mask)
    has_positive = ((labels > 0) & real).any(axis=1)
    return np.where(has_positive, ndcg_at_k(scores, labels, 5, mask), np.nan)


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


REWARDS: dict[str, Metric] = {"ndcg@5": ndcg_reward, "log_likelihood": log_likelihood_reward}


@dataclass(frozen=True)
class CarryOver:
    """How far a choice among N samples holds on lists it was not made on; U' users without NaN."""

    gap_in_sample: FloatArray  # [U'] best minus worst, measured where they were chosen
    gap_held_out: FloatArray  # [U'] the same two samples, measured on the other half
    rank_correlation: FloatArray  # [U'] Spearman between the halves over the N samples
    kept: npt.NDArray[np.int64]  # [U'] rows of the input


def carry_over(half_a: Array, half_b: Array) -> CarryOver:
    """Choose best and worst sample on one half of a user's lists, measure their gap on both (beyond).

    half_a, half_b: [U, N] mean rewards of each sample on two disjoint halves of the user's lists. The gaps
    are averaged over both directions. Users with a NaN in either half are dropped. Tied samples share their
    mean rank; a half in which all samples tie orders nothing and gives correlation 0.0.

    Raises:
        ValueError: shapes differ or are not [U, N] with N >= 1.
    """
    if half_a.ndim != 2 or half_a.shape != half_b.shape or half_a.shape[1] == 0:
        raise ValueError(f"halves must share a shape [U, N], N >= 1, got {half_a.shape} and {half_b.shape}")
    kept = np.flatnonzero(~(np.isnan(half_a) | np.isnan(half_b)).any(axis=1))
    first, second = half_a[kept].astype(np.float64), half_b[kept].astype(np.float64)
    return CarryOver(
        gap_in_sample=(_gap(first, first) + _gap(second, second)) / 2,
        gap_held_out=(_gap(first, second) + _gap(second, first)) / 2,
        rank_correlation=_spearman(first, second),
        kept=kept.astype(np.int64),
    )


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
