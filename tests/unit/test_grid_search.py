"""What a trial reports and what its row says, without Tune."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpo4rec_ray import grid_search
from dpo4rec_ray.config.ranking import RerankerSection
from dpo4rec_ray.rerankers.fit_knowledge import fit_reranker
from tests.unit.rerankers.conftest import World, make_world


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(120, num_users=20)


def section(way: str, **changes: Any) -> RerankerSection:
    values = {"knowledge": way, "epochs": 3, "batch_size": 32, "resample_negatives": False, **changes}
    return RerankerSection.model_validate(values)


def reports(
    world: World, own: RerankerSection, knowledge: bool, monkeypatch: pytest.MonkeyPatch, **settings: float
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(grid_search.tune, "report", found.append)
    vectors = torch.from_numpy(world.user_vectors) if knowledge else None
    data = grid_search.Data(world.catalogue, world.train, world.valid, vectors)
    grid_search._fit_one({"settings": settings}, own, 1, "cpu", data)
    return found


@pytest.mark.parametrize(
    ("way", "knowledge", "epochs"),
    [("regression", False, 3), ("input", True, 3), ("regression", True, 3), ("residual", True, 6)],
)
def test_a_trial_is_the_fit_with_its_settings(
    world: World, way: str, knowledge: bool, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each epoch with the best one so far, and what came out in the end, which texts behind a backbone decide last."""
    own = section(way)
    each = reports(world, own, knowledge, monkeypatch, lr=3e-3)
    assert [report["epoch"] for report in each] == [*range(1, epochs + 1)]
    assert grid_search._epochs(own, knowledge) == epochs
    # One report per epoch: at the last one the scheduler ends a trial, so what comes out has to be in it.
    assert [report["finished"] for report in each] == [False] * (epochs - 1) + [True]
    *each, last = each
    best = [report["best_valid"] for report in each]
    assert best == sorted(best) and best[each[-1]["best_epoch"] - 1] == best[-1]
    expected = fit_reranker(
        own.architecture,
        world.catalogue,
        world.train,
        world.valid,
        torch.from_numpy(world.user_vectors) if knowledge else None,
        own.model_copy(update={"lr": 3e-3}).fit,
        seed=1,
    )
    assert last["best_valid"] == expected.result.best_value


def test_a_training_that_diverges_is_reported(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    last = reports(world, section("regression", epochs=30), False, monkeypatch, lr=1e30)[-1]
    assert "reranker.lr" in last["failure"] and not last["finished"]


@pytest.mark.parametrize(
    ("change", "ended"),
    [
        ({}, "complete"),
        ({"epoch": 5}, "out of patience"),
        ({"epoch": 4, "finished": False}, "stopped by the scheduler"),
        ({"epoch": 6, "finished": False, "failure": "loss is nan"}, "failed: loss is nan"),
    ],
)
def test_the_row_says_how_a_trial_ended(change: dict[str, Any], ended: str) -> None:
    state = {"epoch": 6, "best_valid": 0.5, "best_epoch": 2, "finished": True, "failure": "", "seconds": 1.0}
    result: Any = SimpleNamespace(metrics=state | change, error=None)
    found = grid_search._trial(section("regression"), 6, {"lr": 1e-3}, result)
    assert (found.ended, found.epochs, found.valid) == (ended, change.get("epoch", 6), 0.5)


def test_a_trial_that_reported_nothing_failed() -> None:
    error = RuntimeError("Traceback:\n  deep\nRuntimeError: out of memory")
    result: Any = SimpleNamespace(metrics=None, error=error)
    found = grid_search._trial(section("input"), 6, {}, result)
    assert found.failed and found.ended == "failed: RuntimeError: out of memory"
