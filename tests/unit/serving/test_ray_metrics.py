"""What a replica's counts become in Ray's metrics, with Ray's own objects replaced by ones that remember."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo4rec_ray.serving.loaded_version import Ranking
from dpo4rec_ray.serving.ray_metrics import RayExport
from dpo4rec_ray.serving.request_metrics import ServingMetrics, WriterMetrics


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    """(name, labels) -> what Ray has been told."""
    found: dict[tuple[str, str], float] = {}

    class Remembers:
        def __init__(self, name: str):
            self.name = name

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value > 0
            key = self.name, ",".join(f"{name}={one}" for name, one in sorted(tags.items()))
            found[key] = found.get(key, 0) + value

        def set(self, value: float, tags: dict[str, str]) -> None:
            found[self.name, ",".join(f"{name}={one}" for name, one in sorted(tags.items()))] = value

    monkeypatch.setattr(RayExport, "_metric", lambda self, kind, name, labels: Remembers(name))
    return found


def ranking() -> Ranking:
    return Ranking(np.array([1, 0]), np.array([0.1, 0.2], np.float32), 2, "stored", True)


def test_only_what_was_added_is_handed_on(tmp_path: Path, handed_on: dict[Any, float]) -> None:
    metrics = ServingMetrics(tmp_path)
    export = RayExport(metrics.registry)
    metrics.answered("v1", ranking(), fallback=False, seconds=0.003)
    metrics.answered("v1", ranking(), fallback=True, seconds=0.2)
    export.push()
    export.push()
    answers = ("dpo4rec_serve_answers_total", "knowledge=stored,version=v1")
    assert handed_on[answers] == 2
    assert handed_on["dpo4rec_serve_fallbacks_total", "version=v1"] == 1
    # As in Prometheus' text format, a bucket holds all that took at most so long.
    assert handed_on["dpo4rec_serve_seconds_bucket", "le=0.005,version=v1"] == 1
    assert handed_on["dpo4rec_serve_seconds_bucket", "le=+Inf,version=v1"] == 2
    assert handed_on["dpo4rec_serve_seconds_sum", "version=v1"] == pytest.approx(0.203)
    metrics.answered("v1", ranking(), fallback=False, seconds=0.003)
    export.push()
    assert handed_on[answers] == 3


def test_the_counts_of_an_earlier_process_with_this_id_are_not_counted_again(
    tmp_path: Path, handed_on: dict[Any, float]
) -> None:
    metrics = ServingMetrics(tmp_path)
    metrics.failed("v1")
    export = RayExport(metrics.registry)
    metrics.failed("v1")
    export.push()
    assert handed_on == {("dpo4rec_serve_failures_total", "version=v1"): 1}


def test_levels_are_handed_on_as_they_are(tmp_path: Path, handed_on: dict[Any, float]) -> None:
    metrics = WriterMetrics(tmp_path)
    export = RayExport(metrics.registry)
    for users in (4, 2):
        metrics.waiting(users)
        export.push()
    assert handed_on["dpo4rec_serve_fresh_waiting", ""] == 2
