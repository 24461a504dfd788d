"""Ends an engine's process if it makes no progress: a small second process that waits for signs of life.

A thread of the engine's own process is not enough: a hung extension may hold the interpreter's lock, and a stopped process
runs no thread at all. The second process is a child of the watched one and needs only the standard library and psutil.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from pathlib import Path

BUSY, IDLE = b"b", b"i"
_SCAN_S = 5.0  # how often the watched process's children are listed


class Watchdog:
    """What the watched process has: call `alive` after progress, and `idle` when there is nothing to do."""

    def __init__(self, timeout_s: float, reason_file: str | Path | None = None):
        """timeout_s: silence after which this process is killed; reason_file: where the reason is written before that."""
        command = [sys.executable, "-m", __spec__.name, str(os.getpid()), str(timeout_s)]
        command.append(str(reason_file or ""))
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        self._last = 0.0

    def alive(self) -> None:
        """There was progress. It costs nothing to call this often."""
        now = time.monotonic()
        if now - self._last > 0.2:
            self._last = now
            self._tell(BUSY)

    def idle(self) -> None:
        """There is no work. Silence is allowed until the next `alive`."""
        self._last = 0.0
        self._tell(IDLE)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.close()
        self._process.wait(timeout=10)

    def _tell(self, sign: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # if the watchdog is gone, the work goes on
            self._pipe.write(sign)
            self._pipe.flush()


def watch(pid: int, timeout_s: float, reason_file: str) -> None:
    """Kill `pid` and its children after `timeout_s` of silence. If `pid` ends by itself, kill the children it left."""
    import psutil

    watched = psutil.Process(pid)
    # All children ever seen: after its parent's death, a child of a child is no longer found below `pid`.
    children: set[psutil.Process] = set()

    def scan() -> None:
        with contextlib.suppress(psutil.Error):
            children.update(child for child in watched.children(recursive=True) if child.pid != os.getpid())

    deadline: float | None = None
    scanned = 0.0
    while True:
        ready, _, _ = select.select([0], [], [], min(1.0, timeout_s / 4))
        now = time.monotonic()
        if ready:
            signs = os.read(0, 4096)
            if not signs:  # the pipe is closed: the process has ended or is going to
                break
            deadline = now + timeout_s if signs.endswith(BUSY) else None
        if now - scanned > _SCAN_S:
            scanned = now
            scan()
        if deadline is not None and now > deadline:
            if reason_file:
                from dpo4rec_ray.storage.places import place, write_text

                with contextlib.suppress(OSError):
                    write_text(place(reason_file), f"no new token for {timeout_s:g} s")
            scan()
            with contextlib.suppress(psutil.Error):
                watched.kill()
            break
    with contextlib.suppress(psutil.Error):
        watched.wait(timeout=10)  # returns at once if the process has ended
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()


if __name__ == "__main__":
    watch(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
