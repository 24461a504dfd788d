"""Hands what a replica has counted to Ray's metrics, where the replicas of all nodes add up.

Requests are counted with Prometheus' client (request_metrics.py): Ray's own counters cost more than to rank a list. Every few
seconds, what was added since is handed on. Ray has no histogram that takes counts, so the buckets of one become a counter with
the tag `le`, as in Prometheus' own text format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class RayExport:
    """The counts of this process for Ray. To be used inside a replica of Ray Serve."""

    def __init__(self, registry: CollectorRegistry):
        self._registry = registry
        self._made: dict[str, Any] = {}
        # A process may find the counts of an earlier one with its id.
        self._handed_on = {key: value for _, key, value in self._samples()}

    def push(self) -> None:
        """Hand on what was added since the last call, and the levels as they are."""
        for kind, key, value in self._samples():
            name, labels = key
            if kind == "gauge":
                self._metric(kind, name, labels).set(value, dict(labels))
            elif added := value - self._handed_on.get(key, 0):
                self._metric(kind, name, labels).inc(added, dict(labels))
                self._handed_on[key] = value

    def _samples(self) -> list[tuple[str, tuple[str, tuple[tuple[str, str], ...]], float]]:
        """(kind, (name, labels), value) of all that this process has counted."""
        return [
            (family.type, (sample.name, tuple(sorted(sample.labels.items()))), sample.value)
            for family in self._registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        ]

    def _metric(self, kind: str, name: str, labels: tuple[tuple[str, str], ...]) -> Any:
        from ray.serve import metrics

        if name not in self._made:
            make = metrics.Gauge if kind == "gauge" else metrics.Counter
            own = name if kind == "gauge" else name.removesuffix("_total")  # which Ray adds again
            self._made[name] = make(own, f"{name} of /metrics", tuple(key for key, _ in labels))
        return self._made[name]
