from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_ray.core.metrics import METRICS, list_metrics, parse_metric
from dpo4rec_ray.errors import UserError

DESCENDING = np.array([[5.0, 4.0, 3.0, 2.0, 1.0]])  # candidate order is rank order


def one(name: str, scores: object, labels: object, mask: object = None) -> float:
    """The metric of a single list."""
    real = None if mask is None else np.array([mask])
    return float(list_metrics(np.array([scores]), np.array([labels]), [name], real)[name][0])


def test_ndcg_by_hand() -> None:
    """Ranked labels 0 1 0 1 0: gains 2^1 - 1 = 1 at ranks 2 and 4.

    DCG@5 = 1/log2(3) + 1/log2(5) = .63093 + .43068 = 1.06161. Ideal 1 1 0 0 0: 1/log2(2) + 1/log2(3) =
    1.63093. NDCG@5 = .650921. At k = 3 only rank 2 counts: .63093 / 1.63093 = .386853.
    """
    labels = [0, 1, 0, 1, 0]
    assert one("ndcg@5", DESCENDING[0], labels) == pytest.approx(0.650921, abs=1e-6)
    assert one("ndcg@3", DESCENDING[0], labels) == pytest.approx(0.386853, abs=1e-6)


def test_ndcg_graded_gain_is_exponential() -> None:
    """Ranked labels 1 2, gains 1 and 3: (1 + 3 * .63093) / (3 + .63093) = 2.892789 / 3.630930 = .796708."""
    assert one("ndcg@2", [2.0, 1.0], [1, 2]) == pytest.approx(0.796708, abs=1e-6)


# Method, section 7: the precision sum over the hits in the top k; map_paper divides it by those hits, map by
# min(k, number of relevant).
MAP_TABLE = [
    # k, ranked labels, map_paper, map
    (5, [0, 1, 0, 1, 0], (1 / 2 + 2 / 4) / 2, (1 / 2 + 2 / 4) / 2),  # both positives found: .5 and .5
    (3, [0, 1, 0, 1, 0], (1 / 2) / 1, (1 / 2) / 2),  # one of two found: .5 but .25
    (3, [1, 0, 0, 1, 1], 1 / 1, 1 / 3),  # one of three found: 1 but 1/3
    (2, [1, 1, 1, 1, 0], (1 + 1) / 2, (1 + 1) / 2),  # more relevant than k: 1 and 1
    (2, [1, 0, 1, 1, 0], 1 / 1, 1 / 2),  # min(k, R) = min(2, 3) = 2
    (5, [1, 0, 1, 0, 1], (1 + 2 / 3 + 3 / 5) / 3, (1 + 2 / 3 + 3 / 5) / 3),  # .755556
    (2, [0, 0, 1, 0, 0], 0.0, 0.0),  # no hit in the top k
    (5, [0, 0, 0, 0, 0], 0.0, 0.0),  # no positive
    (9, [0, 0, 1, 0, 0], 1 / 3, 1 / 3),  # k beyond the list
]


@pytest.mark.parametrize(("k", "labels", "map_paper", "map_plain"), MAP_TABLE)
def test_both_maps_by_hand(k: int, labels: list[int], map_paper: float, map_plain: float) -> None:
    """Values of `MAP_TABLE`, worked in its comments."""
    assert one(f"map_paper@{k}", DESCENDING[0], labels) == pytest.approx(map_paper, abs=1e-12)
    assert one(f"map@{k}", DESCENDING[0], labels) == pytest.approx(map_plain, abs=1e-12)


@pytest.mark.parametrize(
    ("labels", "k", "mrr", "hr"),
    [
        ([0, 0, 1, 0, 1], 5, 1 / 3, 1.0),  # first relevant at rank 3; the one at rank 5 adds nothing
        ([0, 0, 1, 0, 1], 3, 1 / 3, 1.0),  # rank 3 is within 3
        ([0, 0, 1, 0, 1], 2, 0.0, 0.0),  # but not within 2
        ([0, 0.5, 3, 0, 0], 1, 0.0, 0.0),
        ([0, 0.5, 3, 0, 0], 9, 1 / 2, 1.0),  # any label above 0 is relevant; k beyond the list
        ([1, 1, 1, 1, 1], 5, 1.0, 1.0),
        ([0, 0, 0, 0, 0], 5, 0.0, 0.0),
    ],
)
def test_mrr_and_hr_by_hand(labels: list[float], k: int, mrr: float, hr: float) -> None:
    """One over the rank of the first relevant item, if that rank is at most k; HR asks only whether there is one."""
    assert one(f"mrr@{k}", DESCENDING[0], labels) == mrr
    assert one(f"hr@{k}", DESCENDING[0], labels) == hr


def test_maps_treat_any_positive_label_as_relevant() -> None:
    """Ranked labels 0 .5 3: precisions 1/2 and 2/3 at the two hits, mean 7/12."""
    assert one("map@3", [3.0, 2.0, 1.0], [0, 0.5, 3]) == pytest.approx(7 / 12)


@pytest.mark.parametrize("name", [f"{metric}@2" for metric in METRICS])
def test_ties_keep_candidate_order(name: str) -> None:
    """All scores equal: rank = place. A positive in place 1 is perfect, in place 3 it is out of the top 2."""
    assert one(name, [1.0, 1.0, 1.0], [1, 0, 0]) == 1.0
    assert one(name, [1.0, 1.0, 1.0], [0, 0, 1]) == 0.0


@pytest.mark.parametrize("name", [f"{metric}@5" for metric in METRICS])
def test_padding_is_never_ranked_or_counted(name: str) -> None:
    """The padded place scores highest and holds a label, a real one scores -inf: still as without padding."""
    padded = one(name, [9.0, -np.inf, 1.0, 2.0], [1, 1, 1, 0], [False, True, True, True])
    assert padded == one(name, [-np.inf, 1.0, 2.0], [1, 1, 0])


def test_padding_below_a_real_minus_infinity() -> None:
    """Padding comes first and the only real candidate scores -inf: it still takes rank 1, the metric is 1."""
    assert one("ndcg@1", [0.0, -np.inf], [0, 1], [False, True]) == 1.0


@pytest.mark.parametrize("name", [f"{metric}@5" for metric in METRICS])
def test_wholly_padded_list_and_empty_batch(name: str) -> None:
    """Nothing real to rank counts 0.0; no list gives no value."""
    assert one(name, [1.0, 2.0], [1, 1], [False, False]) == 0.0
    assert list_metrics(np.empty((0, 3)), np.empty((0, 3)), [name])[name].shape == (0,)
    assert list_metrics(np.empty((2, 0)), np.empty((2, 0)), [name])[name].tolist() == [0.0, 0.0]


def test_float32_and_integer_inputs_give_float64() -> None:
    """Labels arrive as float32 or int; the metric is float64 and the same."""
    scores = DESCENDING.astype(np.float32)
    for labels in (np.array([[0, 1, 0, 1, 0]]), np.array([[0, 1, 0, 1, 0]], dtype=np.float32)):
        value = list_metrics(scores, labels, ["ndcg@5"])["ndcg@5"]
        assert value.dtype == np.float64
        assert value[0] == pytest.approx(0.650921, abs=1e-6)


def test_bad_arrays_raise() -> None:
    """A NaN score would silently rank last; shapes must agree."""
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        one("ndcg@5", [np.nan, 1.0], [1, 0])
    assert one("ndcg@5", [np.nan, 1.0], [1, 1], [False, True]) == 1.0
    with pytest.raises(ValueError, match="one shape"):
        list_metrics(np.zeros((1, 2)), np.zeros((1, 3)), ["map@5"])
    with pytest.raises(ValueError, match="one shape"):
        list_metrics(np.zeros((1, 2)), np.zeros((1, 2)), ["map@5"], np.ones((1, 3), bool))


@pytest.mark.parametrize(
    "name", ["recall@5", "ndcg", "ndcg@", "ndcg@0", "ndcg@-1", "ndcg@5.0", "ndcg@²", "@5", ""]
)
def test_unknown_metric_names_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match="ndcg@k, map_paper@k, map@k, mrr@k, hr@k"):
        parse_metric(name)
    with pytest.raises(UserError, match=f"unknown metric '{re.escape(name)}'"):
        list_metrics(np.zeros((1, 2)), np.zeros((1, 2)), ["ndcg@5", name])


@st.composite
def lists(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with many ties, graded labels and a mask, [B, L]."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 7)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return (
        rng.integers(0, 4, shape).astype(float),
        rng.integers(0, 4, shape).astype(float),
        rng.random(shape) < 0.7,
    )


@given(lists(), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_metrics_against_a_loop(data: tuple[np.ndarray, np.ndarray, np.ndarray], k: int, other: int) -> None:
    """The definitions again as plain loops over ranks, one list at a time; the cut-offs asked for beside k do not matter."""
    scores, labels, mask = data
    names = [f"{metric}@{cut}" for cut in (other, k) for metric in METRICS]
    every = list_metrics(scores, labels, names, mask)
    assert list(every) == list(dict.fromkeys(names))
    got = {metric: every[f"{metric}@{k}"] for metric in METRICS}
    for row in range(len(scores)):
        real = [place for place in range(scores.shape[1]) if mask[row, place]]
        ranked = [labels[row, place] for place in sorted(real, key=lambda place: -scores[row, place])]
        dcg, ideal = (
            sum((2**label - 1) / np.log2(rank + 1) for rank, label in enumerate(order[:k], 1))
            for order in (ranked, sorted(ranked, reverse=True))
        )
        hits, precision_sum = 0, 0.0
        for rank, label in enumerate(ranked[:k], 1):
            if label > 0:
                hits += 1
                precision_sum += hits / rank
        relevant = sum(label > 0 for label in ranked)
        assert got["ndcg"][row] == pytest.approx(dcg / ideal if ideal else 0.0, abs=1e-12)
        assert got["map_paper"][row] == pytest.approx(precision_sum / hits if hits else 0.0, abs=1e-12)
        assert got["map"][row] == pytest.approx(
            precision_sum / min(k, relevant) if relevant else 0.0, abs=1e-12
        )
        first = next((rank for rank, label in enumerate(ranked[:k], 1) if label > 0), None)
        assert got["mrr"][row] == (1 / first if first else 0.0)
        assert got["hr"][row] == (1.0 if first else 0.0)


def test_many_lists_are_ranked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 2 lists of 3 (7 candidates fit), the last of one list, and lists longer than a part: the same values."""
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(7, 3)), rng.integers(0, 2, (7, 3))
    mask = rng.random((7, 3)) < 0.8
    names = [f"{metric}@2" for metric in METRICS]
    whole = list_metrics(scores, labels, names, mask)
    for at_once in (7, 1):
        monkeypatch.setattr("dpo4rec_ray.core.metrics._MAX_CANDIDATES_AT_ONCE", at_once)
        parts = list_metrics(scores, labels, names, mask)
        for name in names:
            np.testing.assert_array_equal(parts[name], whole[name])
