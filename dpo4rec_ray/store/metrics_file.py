"""metrics.jsonl: one JSON line per training step, written by rank 0 and read by the driver and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo4rec_ray.atomic import new_file

METRICS = "metrics.jsonl"


class MetricsFile:
    """Appends lines to metrics.jsonl; ranks other than 0 write nothing."""

    def __init__(self, folder: str | Path, rank: int):
        self._file = Path(folder) / METRICS if rank == 0 else None

    def go_on_after(self, step: int) -> None:
        """Remove the lines of steps after `step`, from which an interrupted training is continued."""
        if self._file is not None:
            kept = [line for line in read_metrics(self._file.parent) if line["step"] <= step]
            with new_file(self._file) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, stats: dict[str, Any]) -> None:
        if self._file is not None:
            with open(self._file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(stats) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All complete lines of a stage's metrics.jsonl."""
    file = folder / METRICS
    if not file.exists():
        return []
    # a killed writer may have left half a line
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
