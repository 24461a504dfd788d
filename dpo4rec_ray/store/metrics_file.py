"""metrics.jsonl: one JSON line per training step or epoch, written by rank 0 or by tasks, read by the driver and the report.

On an object store nothing can be appended: there every writer has an object of its own, which it writes again every few seconds.
"""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any

from dpo4rec_ray.storage.places import Place, is_remote, place, remove, write_text

METRICS = "metrics.jsonl"
_TAIL = 8192  # bytes at the end that hold the last line
_REWRITE_S = 2.0


class MetricsFile:
    """Appends lines; ranks other than 0 write nothing. On an object store `flush` writes what the last seconds brought."""

    def __init__(self, folder: str | Path, rank: int):
        self._folder = place(folder) if rank == 0 else None
        self._remote = self._folder is not None and is_remote(self._folder)
        name = f"metrics-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.jsonl" if self._remote else METRICS
        self._file = None if self._folder is None else self._folder / name
        self._lines: list[str] = []  # of this writer, on an object store
        self._flushed_at = 0.0

    def go_on_after(self, step: int) -> None:
        """Remove the lines of steps after `step`, from which an interrupted training is continued."""
        if self._folder is not None and self._file is not None:
            kept = [json.dumps(line) + "\n" for line in read_metrics(self._folder) if line["step"] <= step]
            write_text(self._file, "".join(kept))
            if self._remote:
                self._lines = kept
                for file in _files(self._folder):
                    if file != self._file:
                        remove(file)

    def write(self, stats: dict[str, Any]) -> None:
        if self._file is None:
            return
        line = json.dumps(stats) + "\n"
        if self._remote:
            self._lines.append(line)
            if time.monotonic() - self._flushed_at >= _REWRITE_S:
                self.flush()
        else:
            with open(self._file, "a", encoding="utf-8") as lines:
                lines.write(line)

    def flush(self) -> None:
        """Write what is not written yet."""
        if self._remote and self._file is not None and self._lines:
            write_text(self._file, "".join(self._lines))
            self._flushed_at = time.monotonic()


def read_metrics(folder: Place) -> list[dict[str, Any]]:
    """All complete lines below a stage's folder."""
    found = []
    for file in _files(folder):
        # a killed writer may have left half a line
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        found += [json.loads(line) for line in lines if line.endswith("\n")]
    return found


def last_metrics(folder: Place) -> dict[str, Any] | None:
    """The newest complete line; None where there is none yet."""
    try:
        if is_remote(folder):
            lines = read_metrics(folder)[-1:]
            return lines[0] if lines else None
        with open(folder / METRICS, "rb") as handle:
            handle.seek(max(0, (folder / METRICS).stat().st_size - _TAIL))
            return json.loads(handle.read().splitlines()[-1])
    except (OSError, IndexError, ValueError):
        return None  # not there yet, or the line is half written


def count_metrics(folder: Place) -> int:
    """How many lines there are."""
    return sum(file.read_bytes().count(b"\n") for file in _files(folder))


def remove_metrics(folder: Place) -> None:
    """Remove all lines."""
    for file in _files(folder):
        remove(file)


def _files(folder: Place) -> list[Place]:
    return sorted(folder.glob("metrics*.jsonl"))
