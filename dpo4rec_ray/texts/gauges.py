"""Counts and engine stats of a sampling actor for Ray's dashboard and its Prometheus endpoint."""

from __future__ import annotations

import threading
from collections import Counter


class Gauges:
    """Exports one actor's counts and levels under the name of its engine. Safe to call from many threads."""

    def __init__(self, engine: str):
        from ray.util.metrics import Counter as RayCounter
        from ray.util.metrics import Gauge

        self._counters = {
            name: RayCounter(f"dpo4rec_{name}", f"{name} done by this engine", ("engine",))
            for name in ("users", "samples", "tokens", "failed")
        }
        self._levels = {
            name: Gauge(
                f"dpo4rec_engine_{name}", f"{name} of this engine, mean since its first request", ("engine",)
            )
            for name in ("busy", "running", "kv_cache")
        }
        self._tags = {"engine": engine}
        self._lock = threading.Lock()

    def count(self, totals: Counter[str]) -> None:
        """Add a shard's counts."""
        with self._lock:
            for name, counter in self._counters.items():
                if totals[name]:
                    counter.inc(totals[name], self._tags)

    def engine(self, busy: float, running: float, kv_cache: float) -> None:
        """The engine's stats as they are now (`EngineStats`)."""
        with self._lock:
            for name, value in (("busy", busy), ("running", running), ("kv_cache", kv_cache)):
                self._levels[name].set(value, self._tags)
