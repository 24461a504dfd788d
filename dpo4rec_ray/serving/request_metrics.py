"""Metrics per version for GET /metrics, in the text format of Prometheus.

The replicas of a node write to files of one folder. The replica that is asked adds them up. Prometheus' client library does
both. It reads the folder from the environment when it is imported, so only this module imports it.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpo4rec_ray.serving.loaded_version import Ranking

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
FRESH_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOP = 5  # places in which the answer of a shadow is compared with the answer that was sent
_VALUES: dict[
    tuple[str, int], Any
] = {}  # classes of Prometheus' client that store values, by folder and process


class ServingMetrics:
    """What a replica answers."""

    def __init__(self, folder: str | Path | None = None):
        """folder: shared by the replicas of a node, and used for nothing else; None: only for this process."""
        self._folder = _use(folder)
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._children: dict[tuple[Any, tuple[str, ...]], Any] = {}
        own = self.registry = CollectorRegistry()  # of this process alone; `text` reads the folder
        counter = partial(Counter, registry=own, namespace="dpo4rec_serve")
        by_version = partial(counter, labelnames=("version",))
        self._answers = counter("answers", "Lists ranked", ("version", "knowledge"))
        self._fallbacks = by_version("fallbacks", "Lists whose user or items are not known")
        self._candidates = by_version("candidates", "Candidates ranked")
        self._unknown = by_version("unknown_candidates", "Candidates that are not known")
        self._overloads = counter("overloads", "Lists refused because too many waited")
        self._failures = by_version("failures", "Lists that ended with an error of ours")
        self._shadows = by_version("shadow_answers", "Lists that a shadow ranked too")
        self._same_first = by_version("shadow_same_first", "Of these, those with the same first item")
        self._same_top = by_version("shadow_same_top", f"Sum of the shares of the first {TOP} in common")
        seconds = "From the parsed request to the ranked list"
        self._seconds = Histogram(
            "dpo4rec_serve_seconds", seconds, ("version",), buckets=SECONDS, registry=own
        )

    def answered(self, version: str, ranking: Ranking, fallback: bool, seconds: float) -> None:
        """A list was ranked."""
        self._of(self._answers, version, ranking.knowledge).inc()
        self._of(self._seconds, version).observe(seconds)
        self._of(self._candidates, version).inc(len(ranking.scores))
        if fallback:
            self._of(self._fallbacks, version).inc()
        if ranking.num_known < len(ranking.scores):
            self._of(self._unknown, version).inc(len(ranking.scores) - ranking.num_known)

    def _of(self, metric: Any, *labels: str) -> Any:
        """`metric.labels(...)`, remembered: that call takes longer than to count."""
        key = (metric, labels)
        if key not in self._children:
            self._children[key] = metric.labels(*labels)
        return self._children[key]

    def overloaded(self) -> None:
        """A list was refused because too many waited."""
        self._overloads.inc()

    def failed(self, version: str) -> None:
        """A list ended with an error of ours."""
        self._failures.labels(version).inc()

    def shadowed(self, version: str, sent: Ranking, shadow: Ranking) -> None:
        """A shadow ranked a list too."""
        self._shadows.labels(version).inc()
        self._same_first.labels(version).inc(int(sent.order[0] == shadow.order[0]))
        top = min(TOP, len(sent.order))
        common = np.intersect1d(sent.order[:top], shadow.order[:top])
        self._same_top.labels(version).inc(len(common) / top)

    def text(self) -> tuple[bytes, str]:
        """All metrics of the node, and their content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
        from prometheus_client.multiprocess import MultiProcessCollector

        whole = CollectorRegistry()
        MultiProcessCollector(whole, path=self._folder)
        return generate_latest(whole), CONTENT_TYPE_LATEST


class WriterMetrics:
    """What becomes of the text jobs (serving/fresh_texts.py)."""

    def __init__(self, folder: str | Path | None = None):
        """folder: that of the node's ServingMetrics, whose `text` then has these metrics too."""
        _use(folder)
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        own = self.registry = CollectorRegistry()
        names: Any = {"registry": own, "namespace": "dpo4rec_serve_fresh"}
        self._waiting = Gauge("waiting", "Users who wait for a text", multiprocess_mode="mostrecent", **names)
        self._refused = Counter("refused", "Jobs that were refused", ("reason",), **names)
        self._failed = Counter("failed", "Texts that could not be written", ("reason",), **names)
        seconds = "From a job to its text; their count is the number of texts written"
        self._seconds = Histogram("seconds", seconds, buckets=FRESH_SECONDS, **names)

    def waiting(self, users: int) -> None:
        """The number of users who wait now."""
        self._waiting.set(users)

    def refused(self, reason: str) -> None:
        """A job was refused. reason: full, version (the writer does not write for this one), unreachable."""
        self._refused.labels(reason).inc()

    def failed(self, reason: str, count: int = 1) -> None:
        """Accepted jobs gave no text."""
        self._failed.labels(reason).inc(count)

    def written(self, seconds: float) -> None:
        """A text was stored. seconds: since the job was accepted."""
        self._seconds.observe(seconds)


def _use(folder: str | Path | None) -> str:
    """Make Prometheus' client write to a folder; None: to a new one."""
    found = str(folder or tempfile.mkdtemp(prefix="dpo4rec-metrics-"))
    Path(found).mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ[FOLDER] = found
    from prometheus_client import values

    # The client asks the system for the process id at every count, as a process may fork. A replica does not fork, and
    # these four system calls per list take a twentieth of its time.
    process = os.getpid()
    if (found, process) not in _VALUES:
        _VALUES[found, process] = values.MultiProcessValue(process_identifier=lambda: process)
    values.ValueClass = _VALUES[found, process]
    return found
