"""A loaded version against the evaluation's own path, and what it does with unknown users and items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo4rec_ray.rerankers.fit import WEIGHTS_FILE, load_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.serving.loaded_version import (
    NEUTRAL_RATING,
    SCORE_TOLERANCE,
    LoadedVersion,
    Ranking,
    RankTask,
)
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.version_check import recorded_task
from dpo4rec_ray.serving.version_files import VersionFiles
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.reading import read_catalogue, read_vectors
from tests.serving_world import MODELS, offline_scores, requests_of

CLOSE = {"atol": SCORE_TOLERANCE, "rtol": 0}


@pytest.fixture(scope="module")
def versions(published: Registry) -> dict[str, LoadedVersion]:
    return {name: LoadedVersion(VersionFiles(published.folder(name))) for name in MODELS}


@pytest.fixture(scope="module")
def items(versions: dict[str, LoadedVersion]) -> list[str]:
    return list(versions["v1"].files.item_rows)


def same(one: Ranking, other: Ranking) -> None:
    """What is promised: equal scores to within the tolerance, and an order that differs only between closer ones."""
    np.testing.assert_allclose(one.scores, other.scores, **CLOSE)
    known = np.isfinite(one.scores[other.order])
    assert np.array_equal(known, np.isfinite(one.scores[one.order])), "unknown candidates are last in both"
    assert one.order[~known].tolist() == other.order[~known].tolist()
    assert sorted(one.order.tolist()) == sorted(other.order.tolist())
    for mine, theirs in ((one, other), (other, one)):
        falls = np.diff(mine.scores[theirs.order[known]])
        assert (falls <= SCORE_TOLERANCE).all(), "candidates changed places whose scores differ by more"
    assert (one.knowledge, one.known_user) == (other.knowledge, other.known_user)


def test_the_promise_is_about_near_ties_alone() -> None:
    def ranking(order: list[int], scores: list[float]) -> Ranking:
        return Ranking(np.array(order), np.array(scores, np.float32), 3, "none", False)

    near = ranking([0, 1, 2, 3], [1.0, 0.5, 0.5 - 1e-6, np.nan])
    same(near, ranking([0, 2, 1, 3], [1.0, 0.5, 0.5 + 1e-6, np.nan]))
    for other in (
        ranking([1, 0, 2, 3], [1.0, 0.5, 0.5, np.nan]),  # apart by more than the tolerance
        ranking([0, 1, 3, 2], [1.0, 0.5, 0.5, np.nan]),  # an unknown one is not last
        ranking([0, 1, 1, 3], [1.0, 0.5, 0.5, np.nan]),  # one is missing
    ):
        with pytest.raises(AssertionError):
            same(near, other)


@pytest.mark.parametrize("name", MODELS)
def test_every_test_list_gets_the_evaluations_scores(
    versions: dict[str, LoadedVersion], served_run: RunDir, name: str
) -> None:
    rankings = versions[name].rank([recorded_task(one) for one in requests_of(served_run)])
    for ranking, scores in zip(rankings, offline_scores(served_run, MODELS[name]), strict=True):
        np.testing.assert_allclose(ranking.scores, scores, **CLOSE)
        assert np.all(np.diff(ranking.scores[ranking.order]) <= 0)
        assert ranking.known_user and ranking.knowledge == ("none" if name == "v3" else "stored")


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_equals_its_requests_one_by_one(
    versions: dict[str, LoadedVersion], served_run: RunDir, items: list[str], name: str
) -> None:
    """Lists of many lengths, known and unknown users and items, with histories and without, and fresh vectors."""
    users = [one["user_id"] for one in requests_of(served_run)[:3]]
    vector = read_vectors(served_run, 0, "user")[1][5]
    requests = [
        RankTask(items[:1], users[0]),
        RankTask(items[5:40], users[1], items[:4], [5.0, 1.0, 3.0, 4.0]),
        RankTask(["nothing", *items[:9], "nothing", ""], "nobody", items[:2]),
        RankTask((items * 4)[:1000], users[2]),
        RankTask(items[20:30], "", ["nothing"], [1.0]),
        RankTask(items[20:30], "newcomer", items[40:42], vector=vector),
        RankTask(["nothing"], users[0], []),
    ]
    together = versions[name].rank(requests)
    for request, ranking in zip(requests, together, strict=True):
        (alone,) = versions[name].rank([request])
        same(ranking, alone)
        assert sorted(ranking.order.tolist()) == list(range(len(request.candidates)))


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_any_number_of_candidates(versions: dict[str, LoadedVersion], items: list[str], count: int) -> None:
    candidates = (items * 4)[:count]
    (ranking,) = versions["v1"].rank([RankTask(candidates, "nobody")])
    assert np.isfinite(ranking.scores).all() and ranking.scores.dtype == np.float32
    assert sorted(ranking.order.tolist()) == list(range(count))


def test_candidates_that_are_not_known_come_last_as_they_came(
    versions: dict[str, LoadedVersion], items: list[str]
) -> None:
    candidates = ["x2", items[3], "x1", items[8], "x3", items[1]]
    (ranking,) = versions["v1"].rank([RankTask(candidates, "nobody")])
    assert ranking.order[3:].tolist() == [0, 2, 4]
    assert np.isnan(ranking.scores[[0, 2, 4]]).all() and np.isfinite(ranking.scores[[1, 3, 5]]).all()
    (none,) = versions["v1"].rank([RankTask(["x2", "x1"], "nobody")])
    assert none.order.tolist() == [0, 1] and np.isnan(none.scores).all()


def test_what_is_not_known_changes_no_score(versions: dict[str, LoadedVersion], items: list[str]) -> None:
    """They stand at the end of the list, because a backbone may read the places of the known ones."""
    known = RankTask(items[:6], "nobody")
    (alone,) = versions["v1"].rank([known])
    (beside,) = versions["v1"].rank([RankTask([*items[:6], "x1", "x2"], "nobody")])
    np.testing.assert_allclose(beside.scores[:6], alone.scores, **CLOSE)
    assert beside.order[:6].tolist() == alone.order.tolist()


def test_equal_scores_keep_the_order_of_the_request(registry: Registry, items: list[str]) -> None:
    """A reranker whose weights are all zero gives equal scores."""
    file = registry.folder("v1") / "reranker" / WEIGHTS_FILE
    save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)
    version = LoadedVersion(VersionFiles(registry.folder("v1")))
    candidates = ["x", *reversed(items[:300]), items[0], items[0]]
    (ranking,) = version.rank([RankTask(candidates, "nobody")])
    assert len(np.unique(ranking.scores[1:])) == 1
    assert ranking.order.tolist() == [*range(1, len(candidates)), 0]


def test_an_unknown_user_is_ranked_without_knowledge(
    versions: dict[str, LoadedVersion], served_run: RunDir, items: list[str]
) -> None:
    """The scores are those of the evaluation with a vector of zeros."""
    catalogue = read_catalogue(served_run)
    model = load_reranker(served_run.path("per_list") / "rerankers" / MODELS["v1"], catalogue)
    rows = np.array([[versions["v1"].files.item_rows[item] for item in items[:12]]])
    nobody = np.zeros((1, catalogue.shape.vector_dim), np.float32)
    expected = ListScorer([model], catalogue).score(rows, None, nobody)[0]
    for user_id in ("", "nobody"):
        (ranking,) = versions["v1"].rank([RankTask(items[:12], user_id)])
        np.testing.assert_allclose(ranking.scores, expected, **CLOSE)
        assert not ranking.known_user and ranking.knowledge == "none"


def test_a_fresh_vector_counts_as_a_stored_one_would(
    versions: dict[str, LoadedVersion], served_run: RunDir, items: list[str]
) -> None:
    version = versions["v1"].files
    vectors = read_vectors(served_run, 0, "user")[1]
    requests = [RankTask(items[:12], version.user_id(row)) for row in range(4)]
    fresh = [RankTask(items[:12], "newcomer", vector=vectors[row]) for row in range(4)]
    for stored, written in zip(
        versions["v1"].rank(requests), versions["v1"].rank([requests[0], *fresh])[1:], strict=True
    ):
        np.testing.assert_allclose(written.scores, stored.scores, **CLOSE)
        assert (stored.knowledge, written.knowledge) == ("stored", "fresh") and not written.known_user
    (kept,) = versions["v1"].rank([RankTask(items[:12], version.user_id(0), vector=vectors[1])])
    same(kept, versions["v1"].rank(requests[:1])[0])


def test_histories(versions: dict[str, LoadedVersion], items: list[str]) -> None:
    """For a backbone that reads histories: the stored one, a sent one, one with unknown items, and none."""
    version = versions["mir"].files
    row = next(row for row in range(version.card.num_users) if len(version.history(row)[0]) > 2)
    rows, ratings = version.history(row)
    own, user_id = [version.item_id(item) for item in rows], version.user_id(row)

    def rank(history: list[str] | None, ratings: Sequence[float] = ()) -> Ranking:
        return versions["mir"].rank([RankTask(items[:12], user_id, history, ratings)])[0]

    same(rank(None), rank(own, ratings))
    same(rank(own, ratings), rank(["x", own[0], "y", *own[1:]], [1.0, ratings[0], 2.0, *ratings[1:]]))
    same(rank(own), rank(own, [NEUTRAL_RATING] * len(own)))
    same(rank(["x"]), rank([]))
    assert not np.allclose(rank(None).scores, rank([]).scores, **CLOSE)
    assert not np.allclose(rank(own, ratings).scores, rank(own[::-1], ratings[::-1]).scores, **CLOSE)


def test_threads_share_a_version(versions: dict[str, LoadedVersion], published: Registry) -> None:
    recorded = json.loads((published.folder("mir") / "recorded.json").read_text(encoding="utf-8"))
    requests = [recorded_task(one) for one in recorded]
    expected = versions["mir"].rank(requests)
    with ThreadPoolExecutor(4) as threads:
        for rankings in threads.map(versions["mir"].rank, [requests] * 12):
            for one, other in zip(rankings, expected, strict=True):
                same(one, other)
