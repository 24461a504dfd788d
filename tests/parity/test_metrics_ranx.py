"""Our metrics against ranx, which computes them per query with its own loops (numba) over item ids."""

from __future__ import annotations

import numpy as np
import pytest
from ranx import Qrels, Run, evaluate

from dpo4rec_ray.core.metrics import map_at_k, metric_by_name

NUM_LISTS, NUM_CANDIDATES, K = 300, 10, 5


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores without ties (ranx leaves their order open), labels 0..3, some lists all 0, ragged masks."""
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(NUM_CANDIDATES, dtype=float), (NUM_LISTS, 1)), axis=1)
    labels = rng.choice(4, p=[0.55, 0.2, 0.15, 0.1], size=scores.shape)
    labels[::10] = 0
    mask = np.arange(NUM_CANDIDATES) < rng.integers(2, NUM_CANDIDATES + 1, size=(NUM_LISTS, 1))
    return scores, labels, mask


def ranx_values(data: tuple[np.ndarray, np.ndarray, np.ndarray], metric: str) -> np.ndarray:
    """ranx's figure per list; padded candidates are left out of both the relevances and the run."""
    scores, labels, mask = data
    lists = {f"{row:04d}": np.flatnonzero(mask[row]) for row in range(len(scores))}
    qrels = Qrels({q: {f"i{i}": int(labels[int(q), i]) for i in places} for q, places in lists.items()})
    run = Run({q: {f"i{i}": float(scores[int(q), i]) for i in places} for q, places in lists.items()})
    return np.asarray(evaluate(qrels, run, metric, return_mean=False))


def test_ndcg_is_ranx_ndcg_burges(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """`ndcg_burges` has the gain 2^label - 1; plain `ndcg` (gain = label) must differ on graded labels."""
    scores, labels, mask = data
    ours = metric_by_name(f"ndcg@{K}")(scores, labels, mask)
    np.testing.assert_allclose(ours, ranx_values(data, f"ndcg_burges@{K}"), atol=1e-12)
    assert np.abs(ours - ranx_values(data, f"ndcg@{K}")).max() > 0.01
    assert (ours == 0).sum() >= NUM_LISTS // 10


def test_map_is_ranx_map_up_to_the_divisor(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """ranx divides by R, the number of relevant items, ours by min(k, R).

    They are equal where R <= k, else ours is R / k times ranx's.
    """
    scores, labels, mask = data
    num_relevant = ((labels > 0) & mask).sum(axis=1)
    ours = map_at_k(scores, labels, K, mask)
    expected = ranx_values(data, f"map@{K}") * np.maximum(num_relevant / K, 1.0)
    np.testing.assert_allclose(ours, expected, atol=1e-12)
    assert (num_relevant > K).any()


def test_full_map_is_ranx_map(data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """With k = L the divisors agree for every list."""
    scores, labels, mask = data
    ours = map_at_k(scores, labels, NUM_CANDIDATES, mask)
    np.testing.assert_allclose(ours, ranx_values(data, "map"), atol=1e-12)
