"""Ray's metrics of a run: what each is called, what it means, and how it is set. Prometheus reads them from every node.

Ray adds the prefix `ray_` to the names here, `_total` to those of counters, and the node as tags. Serving has its own, which are
counted as Prometheus' (serving/request_metrics.py).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dpo4rec_ray.store import progress

STAGE = ("run", "stage", "round")


@dataclass(frozen=True)
class Metric:
    """What is exported under one name."""

    kind: Literal["counter", "gauge"]
    text: str
    tags: tuple[str, ...] = STAGE


# The driver sets the first two groups, the workers the rest.
METRICS = {
    "dpo4rec_stage_running": Metric("gauge", "1 while the stage works, 0 when it has ended"),
    "dpo4rec_stage_done": Metric(
        "gauge", "Units of this part of the stage that are done", (*STAGE, "part", "unit")
    ),
    "dpo4rec_stage_size": Metric("gauge", "Units that there are; 0 if unknown", (*STAGE, "part", "unit")),
    **{
        f"dpo4rec_training_{name}": Metric("gauge", f"{name} of the newest optimiser step")
        for name in ("loss", "accuracy", "rows_per_s", "tokens_per_s")
    },
    **{
        f"dpo4rec_{name}": Metric("counter", f"{name} done by this engine", (*STAGE, "engine"))
        for name in ("users", "samples", "tokens", "failed")
    },
    **{
        f"dpo4rec_engine_{name}": Metric(
            "gauge", f"{name}, mean since the engine's first request", (*STAGE, "engine")
        )
        for name in ("busy", "running", "kv_cache")
    },
    "dpo4rec_rewards": Metric("counter", "Samples that got their reward"),
}
_made: dict[str, Any] = {}  # Ray's objects of this process, by name
_lock = threading.Lock()
_stage: Metrics | None = None  # of the stage that the driver is in


class Metrics:
    """Sets metrics with the same tags. Safe to call from many threads; without a Ray nothing happens."""

    def __init__(self, run: str, stage: str, round_id: int, **more: str):
        """more: further tags, such as the engine's name."""
        self._tags = {"run": run, "stage": stage, "round": str(round_id), **more}

    def count(self, name: str, amount: float) -> None:
        """Add to a counter of `METRICS`."""
        if amount:
            _ray_metric(name).inc(amount, self._tags)

    def level(self, name: str, value: float, **more: str) -> None:
        """Set a gauge of `METRICS`. more: further tags."""
        _ray_metric(name).set(value, self._tags | more)


@contextlib.contextmanager
def stage_metrics(run: str, stage: str, round_id: int) -> Iterator[None]:
    """While it is open: that the stage works, and how far each part of it is."""
    global _stage
    own = _stage = Metrics(run, stage, round_id)

    def follow(part: str, unit: str, done: int, size: int) -> None:
        own.level("dpo4rec_stage_done", done, part=part, unit=unit)
        own.level("dpo4rec_stage_size", size, part=part, unit=unit)

    own.level("dpo4rec_stage_running", 1)
    progress.followers.append(follow)
    try:
        yield
    finally:
        progress.followers.remove(follow)
        own.level("dpo4rec_stage_running", 0)
        _stage = None


def trained(step: Mapping[str, Any]) -> None:
    """A training of the stage that works has come to this step. step: a line of metrics.jsonl."""
    for name in ("loss", "accuracy", "rows_per_s", "tokens_per_s"):
        if _stage is not None and name in step:
            _stage.level(f"dpo4rec_training_{name}", step[name])


def _ray_metric(name: str) -> Any:
    from ray.util import metrics

    with _lock:
        if name not in _made:
            found = METRICS[name]
            kind = {"counter": metrics.Counter, "gauge": metrics.Gauge}[found.kind]
            _made[name] = kind(name, found.text, found.tags)
        return _made[name]
