"""Our metrics against ranx, which computes them per query with its own loops (numba) over item ids.

ranx has no `map_paper@k`: a table worked by hand stands at the end.
"""

from __future__ import annotations

import numpy as np
import pytest
from ranx import Qrels, Run, evaluate

from dpo4rec_ray.core.metrics import list_metrics

NUM_LISTS, NUM_CANDIDATES = 300, 10
CUT_OFFS = (1, 3, 5, 10)


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
    """ranx's value per list; padded candidates are left out of both the relevances and the run."""
    scores, labels, mask = data
    lists = {f"{row:04d}": np.flatnonzero(mask[row]) for row in range(len(scores))}
    qrels = Qrels({q: {f"i{i}": int(labels[int(q), i]) for i in places} for q, places in lists.items()})
    run = Run({q: {f"i{i}": float(scores[int(q), i]) for i in places} for q, places in lists.items()})
    return np.asarray(evaluate(qrels, run, metric, return_mean=False))


@pytest.mark.parametrize("k", CUT_OFFS)
def test_ndcg_is_ranx_ndcg_burges(data: tuple[np.ndarray, np.ndarray, np.ndarray], k: int) -> None:
    """`ndcg_burges` has the gain 2^label - 1; plain `ndcg` (gain = label) must differ on graded labels."""
    scores, labels, mask = data
    ours = list_metrics(scores, labels, [f"ndcg@{k}"], mask)[f"ndcg@{k}"]
    np.testing.assert_allclose(ours, ranx_values(data, f"ndcg_burges@{k}"), atol=1e-12)
    assert np.abs(ours - ranx_values(data, f"ndcg@{k}")).max() > 0.01
    assert (ours == 0).sum() >= NUM_LISTS // 10


@pytest.mark.parametrize("k", CUT_OFFS)
def test_map_is_ranx_map_up_to_the_divisor(data: tuple[np.ndarray, np.ndarray, np.ndarray], k: int) -> None:
    """ranx divides by R, the number of relevant items, ours by min(k, R).

    They are equal where R <= k, with k = L for every list; else ours is R / k times ranx's.
    """
    scores, labels, mask = data
    num_relevant = ((labels > 0) & mask).sum(axis=1)
    ours = list_metrics(scores, labels, [f"map@{k}"], mask)[f"map@{k}"]
    expected = ranx_values(data, f"map@{k}") * np.maximum(num_relevant / k, 1.0)
    np.testing.assert_allclose(ours, expected, atol=1e-12)
    assert (num_relevant > k).any() == (k < NUM_CANDIDATES)


@pytest.mark.parametrize("k", CUT_OFFS)
@pytest.mark.parametrize(("ours", "theirs"), [("mrr", "mrr"), ("hr", "hit_rate")])
def test_mrr_and_hr_are_ranx_ones(
    data: tuple[np.ndarray, np.ndarray, np.ndarray], ours: str, theirs: str, k: int
) -> None:
    """Both kinds of lists, those that find a relevant item within k and those that do not, are there."""
    scores, labels, mask = data
    found = list_metrics(scores, labels, [f"{ours}@{k}"], mask)[f"{ours}@{k}"]
    np.testing.assert_allclose(found, ranx_values(data, f"{theirs}@{k}"), atol=1e-12)
    assert (found > 0).any() and (found == 0).any()


# Ranked labels -> map_paper@1, @3, @5 and @10: the precisions at the hits within k, over the number of these hits.
MAP_PAPER_TABLE: list[tuple[list[int], list[float]]] = [
    # hits at 1, 2: k = 1: 1/1. From 3: (1 + 2/2) / 2
    ([1, 1, 0, 0, 0, 0, 0, 0, 0, 0], [1.0, 1.0, 1.0, 1.0]),
    # hits at 2, 4: k = 1: no hit. 3: (1/2) / 1. 5 and 10: (1/2 + 2/4) / 2
    ([0, 1, 0, 1, 0, 0, 0, 0, 0, 0], [0.0, 0.5, 0.5, 0.5]),
    # hits at 3, 5, 6: 3: (1/3) / 1. 5: (1/3 + 2/5) / 2 = 11/30. 10: (1/3 + 2/5 + 3/6) / 3 = 37/90
    ([0, 0, 1, 0, 1, 1, 0, 0, 0, 0], [0.0, 1 / 3, 11 / 30, 37 / 90]),
    # hits at 1, 10: 1, 3, 5: 1/1. 10: (1 + 2/10) / 2: the late hit lowers the mean
    ([1, 0, 0, 0, 0, 0, 0, 0, 0, 1], [1.0, 1.0, 1.0, 0.6]),
    # hits at 1, 3, 4, 5: 3: (1 + 2/3) / 2 = 5/6. 5 and 10: (1 + 2/3 + 3/4 + 4/5) / 4 = (193/60) / 4
    ([1, 0, 1, 1, 1, 0, 0, 0, 0, 0], [1.0, 5 / 6, 193 / 240, 193 / 240]),
    # one hit, at 7: only k = 10 finds it: (1/7) / 1
    ([0, 0, 0, 0, 0, 0, 1, 0, 0, 0], [0.0, 0.0, 0.0, 1 / 7]),
    # hits at 4, 6, 7, 9: 5: (1/4) / 1. 10: (1/4 + 2/6 + 3/7 + 4/9) / 4 = (63 + 84 + 108 + 112) / 252 / 4
    ([0, 0, 0, 1, 0, 1, 1, 0, 1, 0], [0.0, 0.0, 1 / 4, 367 / 1008]),
    # no relevant item
    ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0]),
]


def test_map_paper_against_a_table_worked_by_hand() -> None:
    """`MAP_PAPER_TABLE`, given in another candidate order with a padded place in front that scores highest."""
    ranked = np.array([labels for labels, _ in MAP_PAPER_TABLE])
    order = np.random.default_rng(1).permuted(np.tile(np.arange(10), (len(ranked), 1)), axis=1)
    labels = np.pad(np.take_along_axis(ranked, order, axis=1), ((0, 0), (1, 0)), constant_values=1)
    scores = np.pad(-order.astype(float), ((0, 0), (1, 0)), constant_values=9.0)
    mask = np.arange(11)[None, :].repeat(len(ranked), axis=0) > 0
    names = [f"map_paper@{k}" for k in CUT_OFFS]
    found = list_metrics(scores, labels, names, mask)
    expected = np.array([values for _, values in MAP_PAPER_TABLE])
    np.testing.assert_allclose(np.stack([found[name] for name in names], axis=1), expected, atol=1e-12)
