"""Ray's metrics of a run, with Ray's own objects replaced by ones that remember."""

from __future__ import annotations

from typing import Any

import pytest

from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.workers import run_metrics
from dpo4rec_ray.workers.run_metrics import METRICS, Metrics, stage_metrics, trained

Seen = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found: Seen = {}

    class Remembers:
        def __init__(self, name: str):
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert METRICS[self.name].kind == "gauge" and set(tags) == set(METRICS[self.name].tags)
            found[self.name, frozenset(tags.items())] = value

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert METRICS[self.name].kind == "counter" and set(tags) == set(METRICS[self.name].tags)
            key = self.name, frozenset(tags.items())
            found[key] = found.get(key, 0) + value

    monkeypatch.setattr(run_metrics, "_ray_metric", Remembers)
    return found


def value(seen: Seen, name: str, **tags: Any) -> float:
    return seen[name, frozenset((key, str(one)) for key, one in tags.items())]


def test_a_stage_tells_how_far_it_is_and_when_it_has_ended(seen: Seen) -> None:
    stage = {"run": "demo", "stage": "score", "round": 1}
    progress = Progress("score", 40, "users")
    with stage_metrics("demo", "score", 1):
        assert value(seen, "dpo4rec_stage_running", **stage) == 1
        progress.at(8)
        progress.at(16)
        assert value(seen, "dpo4rec_stage_done", **stage, part="score", unit="users") == 16
        assert value(seen, "dpo4rec_stage_size", **stage, part="score", unit="users") == 40
    assert value(seen, "dpo4rec_stage_running", **stage) == 0
    progress.at(40)  # nobody listens any more
    assert value(seen, "dpo4rec_stage_done", **stage, part="score", unit="users") == 16


def test_a_stage_that_fails_has_ended_too(seen: Seen) -> None:
    with pytest.raises(ValueError), stage_metrics("demo", "dpo", 2):
        raise ValueError
    assert value(seen, "dpo4rec_stage_running", run="demo", stage="dpo", round=2) == 0


def test_steps_of_a_training_belong_to_the_stage_that_works(seen: Seen) -> None:
    trained({"loss": 0.7})  # no stage works
    assert not seen
    with stage_metrics("demo", "dpo", 1):
        trained({"loss": 0.6, "rows_per_s": 12.0, "step": 3, "num_steps": 9})
    stage = {"run": "demo", "stage": "dpo", "round": 1}
    assert value(seen, "dpo4rec_training_loss", **stage) == 0.6
    assert value(seen, "dpo4rec_training_rows_per_s", **stage) == 12
    assert not [name for name, _ in seen if name == "dpo4rec_training_accuracy"]


def test_counts_add_up_and_nothing_is_not_counted(seen: Seen) -> None:
    own = Metrics("demo", "generate", 1, engine="a")
    own.count("dpo4rec_users", 0)
    assert not seen
    own.count("dpo4rec_users", 3)
    own.count("dpo4rec_users", 4)
    assert value(seen, "dpo4rec_users", run="demo", stage="generate", round=1, engine="a") == 7
