"""What a stage reports when it is done."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from dpo4rec_ray.store.artifacts import Manifest
from dpo4rec_ray.store.dependencies import Dependencies
from dpo4rec_ray.store.memory import peak_rss_mb
from dpo4rec_ray.store.versions import commit, versions


@dataclass
class Outcome:
    """What a stage reports: rows in and out, and the figures for its manifest."""

    rows_in: int
    rows_out: int
    stats: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)  # per artifact, where a stage writes several

    def manifest(self, artifact: str, depends: Dependencies, seconds: float, seed: int) -> Manifest:
        return Manifest(
            artifact=artifact,
            fingerprint=depends.fingerprint,
            rows=self.rows.get(artifact, self.rows_out),
            seconds=seconds,
            rows_in=self.rows_in,
            stats=self.stats,
            inputs=depends.inputs,
            settings=depends.settings,
            outside=depends.outside,
            versions=versions(),
            seed=seed,
            commit=commit(),
            produced=uuid.uuid4().hex[:12],
            peak_rss_mb=round(peak_rss_mb()),
        )
