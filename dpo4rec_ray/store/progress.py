"""Lines on the terminal: single ones, and a line every few seconds while work is done."""

from __future__ import annotations

import threading
import time

EVERY_S = 5.0  # between two lines of a Progress


def say(text: str) -> None:
    """One line for the person at the terminal."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


class Progress:
    """A line every few seconds while it is open: done of total, rate, time left; before that, for how long it starts."""

    def __init__(self, label: str, total: int, unit: str, *, already: int = 0):
        """`already` units were done by an earlier run: they count as done, but not in the rate. total 0: not known."""
        self._label, self._total, self._unit = label, total, unit
        self._done, self._extra = already, ""
        self._opened = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first result came: workers start up before it
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def at(self, done: int, extra: str = "", *, total: int | None = None) -> None:
        """`done` units are complete; `total` where it was not known before."""
        self._total = self._total if total is None else total
        if self._first is None and done > self._done:
            self._first = (time.monotonic(), done)
        self._done, self._extra = done, extra

    def _tick(self) -> None:
        while not self._stop.wait(EVERY_S):
            if self._first is None or self._done < self._total or not self._total:
                say(f"  {self._label}: {self._line()}")

    def _line(self) -> str:
        now = time.monotonic()
        if self._first is None:
            return f"workers are starting, {now - self._opened:.0f} s"
        since, base = self._first
        line = f"{self._done}/{self._total} {self._unit}" if self._total else f"{self._done:,} {self._unit}"
        if self._done > base:
            rate = (self._done - base) / (now - since)
            line += f", {rate:.1f}/s"
            line += f", {(self._total - self._done) / rate:.0f} s left" if self._total else ""
        return f"{line}, {self._extra}" if self._extra else line
