"""Waits for many small Ray tasks and shows their progress."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo4rec_ray.store.progress import Progress


def wait_for_epochs(tasks: Sequence[Any], file: Path, label: str, total: int) -> None:
    """Wait for Ray tasks that append one line per epoch to `file`. Raises what a task raised.

    total: epochs of all tasks together, if none stops early.
    """
    import ray

    waiting = list(tasks)
    with Progress(label, total, "epochs") as progress:
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=1.0)
            ray.get(done)
            if file.exists():
                with open(file, "rb") as lines:
                    progress.at(sum(1 for _ in lines))
