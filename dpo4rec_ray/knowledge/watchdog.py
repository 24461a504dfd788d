"""Ends an engine's process when it makes no progress, from outside: a small process that waits for signs of life.

A thread inside would not do: a hung extension may hold the interpreter's lock, and a stopped process runs no thread at
all. Started as a child of the process it watches, this one needs nothing but the standard library and psutil.
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
    """The watched process's end. Made once; `alive` after progress, `idle` when there is nothing to do."""

    def __init__(self, timeout_s: float, note: Path | None = None):
        """note: where the reason is written before the process is killed."""
        command = [sys.executable, "-m", __spec__.name, str(os.getpid()), str(timeout_s), str(note or "")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin
        self._last = 0.0

    def alive(self) -> None:
        """There was progress. Costs nothing when called often."""
        now = time.monotonic()
        if now - self._last > 0.2:
            self._last = now
            self._tell(BUSY)

    def idle(self) -> None:
        """No work is under way: silence is no sign of trouble until the next `alive`."""
        self._last = 0.0
        self._tell(IDLE)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.close()
        self._process.wait(timeout=10)

    def _tell(self, sign: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # without a watchdog the work goes on
            self._pipe.write(sign)
            self._pipe.flush()


def watch(pid: int, timeout_s: float, note: str) -> None:
    """Kill `pid` and its children after `timeout_s` of silence; when it ends by itself, what it leaves behind."""
    import psutil

    watched = psutil.Process(pid)
    children: set[psutil.Process] = (
        set()
    )  # ever seen: a child of a child that died is nobody's descendant any more

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
            if not signs:  # the pipe is closed: the process has ended, or is about to
                break
            deadline = now + timeout_s if signs.endswith(BUSY) else None
        if now - scanned > _SCAN_S:
            scanned = now
            scan()
        if deadline is not None and now > deadline:
            if note:
                with contextlib.suppress(OSError):
                    Path(note).write_text(f"no new token for {timeout_s:g} s")
            scan()
            with contextlib.suppress(psutil.Error):
                watched.kill()
            break
    with contextlib.suppress(psutil.Error):
        watched.wait(timeout=10)  # psutil: returns at once for a process that is gone
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()


if __name__ == "__main__":
    watch(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
