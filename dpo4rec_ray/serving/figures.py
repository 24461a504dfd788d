"""Figures per version, for GET /metrics (Prometheus' text format).

The replicas of a node write to files of one folder, which any of them adds up when it is asked; Prometheus' client does
both. The folder has to be in the environment before that library is imported, so it is imported here alone.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dpo4rec_ray.serving.ranker import Ranking

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
FRESH_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_VALUES: dict[tuple[str, int], Any] = {}  # how values are kept, by folder and process
TOP = 5  # places in which a shadow's answer is compared with the one that was given


class Figures:
    """Counts what a node's replicas answer."""

    def __init__(self, folder: str | Path | None = None):
        """folder: shared by the replicas of a node and by nothing else; None: this process alone."""
        self._folder = _begin(folder)
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._children: dict[tuple[Any, tuple[str, ...]], Any] = {}
        own = CollectorRegistry()  # read through the folder; this one only holds the objects

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"dpo4rec_serve_{name}", text, labels, registry=own)

        self._answers = counter("answers", "Lists ranked", "version", "knowledge")
        self._fallbacks = counter("fallbacks", "Lists whose user or items are not known", "version")
        self._candidates = counter("candidates", "Candidates ranked", "version")
        self._unknown = counter("unknown_candidates", "Candidates that are not known", "version")
        self._overloads = counter("overloads", "Lists refused because too many waited")
        self._failures = counter("failures", "Lists that ended with an error of ours", "version")
        self._shadows = counter("shadow_answers", "Lists that a shadow ranked too", "version")
        self._same_first = counter("shadow_same_first", "Of these, those with the same first item", "version")
        self._same_top = counter(
            "shadow_same_top", f"Sum of the shares of the first {TOP} in common", "version"
        )
        self._seconds = Histogram(
            "dpo4rec_serve_seconds",
            "From the parsed request to the ranked list",
            ("version",),
            buckets=SECONDS,
            registry=own,
        )

    def answered(self, version: str, ranking: Ranking, fallback: bool, seconds: float) -> None:
        """One list was ranked."""
        self._of(self._answers, version, ranking.knowledge).inc()
        self._of(self._seconds, version).observe(seconds)
        self._of(self._candidates, version).inc(len(ranking.scores))
        if fallback:
            self._of(self._fallbacks, version).inc()
        if ranking.num_known < len(ranking.scores):
            self._of(self._unknown, version).inc(len(ranking.scores) - ranking.num_known)

    def _of(self, figure: Any, *labels: str) -> Any:
        """`figure.labels(...)`, which takes longer than to count."""
        key = (figure, labels)
        if key not in self._children:
            self._children[key] = figure.labels(*labels)
        return self._children[key]

    def overloaded(self) -> None:
        """A list was refused."""
        self._overloads.inc()

    def failed(self, version: str) -> None:
        """A list ended with an error of ours."""
        self._failures.labels(version).inc()

    def shadowed(self, version: str, given: Ranking, shadow: Ranking) -> None:
        """A shadow ranked a list too."""
        self._shadows.labels(version).inc()
        self._same_first.labels(version).inc(int(given.order[0] == shadow.order[0]))
        top = min(TOP, len(given.order))
        common = np.intersect1d(given.order[:top], shadow.order[:top])
        self._same_top.labels(version).inc(len(common) / top)

    def text(self) -> tuple[bytes, str]:
        """All figures of the node, and their content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
        from prometheus_client.multiprocess import MultiProcessCollector

        whole = CollectorRegistry()
        MultiProcessCollector(whole, path=self._folder)
        return generate_latest(whole), CONTENT_TYPE_LATEST


class FreshFigures:
    """Counts what becomes of the texts that are ordered for users whom no version knows (serving/writer)."""

    def __init__(self, folder: str | Path | None = None):
        """folder: as of the node's `Figures`, which then give these too."""
        _begin(folder)
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        own = CollectorRegistry()
        self._waiting = Gauge(
            "dpo4rec_serve_fresh_waiting",
            "Users who wait for a text",
            registry=own,
            multiprocess_mode="mostrecent",
        )
        self._refused = Counter(
            "dpo4rec_serve_fresh_refused", "Orders that were not taken", ("reason",), registry=own
        )
        self._failed = Counter(
            "dpo4rec_serve_fresh_failed", "Texts that could not be written", ("reason",), registry=own
        )
        self._seconds = Histogram(
            "dpo4rec_serve_fresh_seconds",
            "From an order to its text; their count is the number of texts written",
            buckets=FRESH_SECONDS,
            registry=own,
        )

    def waiting(self, users: int) -> None:
        """So many wait now."""
        self._waiting.set(users)

    def refused(self, reason: str) -> None:
        """An order was not taken: full, version (one that the writer does not write for), unreachable."""
        self._refused.labels(reason).inc()

    def failed(self, reason: str, count: int = 1) -> None:
        """Orders that were taken gave no text."""
        self._failed.labels(reason).inc(count)

    def written(self, seconds: float) -> None:
        """A text is in the store."""
        self._seconds.observe(seconds)


def _begin(folder: str | Path | None) -> str:
    """Make the folder known to Prometheus' client; a new one for None."""
    found = str(folder or tempfile.mkdtemp(prefix="dpo4rec-figures-"))
    Path(found).mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ[FOLDER] = found
    from prometheus_client import values

    # The client asks the system for the process id at every count, in case the process has forked: a replica does not, and
    # four system calls per list are a twentieth of its time.
    process = os.getpid()
    if (found, process) not in _VALUES:
        _VALUES[found, process] = values.MultiProcessValue(process_identifier=lambda: process)
    values.ValueClass = _VALUES[found, process]
    return found
