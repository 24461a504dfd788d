"""Peak memory of a run: the resident sizes of this process and all its descendants, summed, sampled every second.

Pages that processes share (Ray's object store, libraries) count once per process, so the figure is an upper bound.
"""

from __future__ import annotations

import contextlib
import threading

import psutil

_peak_mb = 0.0


def peak_rss_mb() -> float:
    """The highest sum seen so far, in MB (2^20 bytes)."""
    return max(_peak_mb, tree_mb())


def watch_memory() -> None:
    """Start the sampling thread; it ends with the process."""
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    global _peak_mb
    pause = threading.Event()
    while not pause.wait(1.0):
        _peak_mb = max(_peak_mb, tree_mb())


def tree_mb(pid: int | None = None) -> float:
    """MB resident now in a process (this one) and all its descendants."""
    me = psutil.Process(pid)
    total = 0
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
            total += process.memory_info().rss
    return total / 2**20
