"""What the person at the terminal sees: single lines, and a bar while work is done; without a terminal, a line now and then."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

EVERY_S = 5.0  # between two lines of a Progress
BAR_WIDTH = 24
_bars: list[Live] = []  # those on the terminal now
# Told of every result: label, unit, done, total (0: not known). They are called in the thread that works.
followers: list[Callable[[str, str, int, int], None]] = []
_open: list[Progress] = []  # for `figures`
_timings: list[Timing] = []  # of those that closed since `take_timings`


@dataclass(frozen=True)
class Timing:
    """How long a Progress was open, so that the start of workers and their work can be told apart.

    Attributes:
        units: done while it was open.
        seconds: from opening to closing.
        first_s: seconds until the first result; that many `first_units` came with it.
        last_s: seconds until the last result.
    """

    label: str
    unit: str
    units: int
    seconds: float
    first_s: float
    first_units: int
    last_s: float


def take_timings() -> list[Timing]:
    """Of every Progress that closed since the last call, in that order."""
    taken = _timings.copy()
    _timings.clear()
    return taken


def figures() -> list[dict[str, Any]]:
    """What every open Progress would tell a program: label, unit, done, total (0: not known), rate per second and seconds left
    (None: not known yet), seconds since it was opened, and why there is no result yet."""
    return [progress.figures() for progress in _open.copy()]


def say(text: str) -> None:
    """One line for the person at the terminal; above the bar, where there is one."""
    line = f"[{time.strftime('%H:%M:%S')}] {text}"
    if not _bars:
        return print(line, flush=True)
    from rich.text import Text

    _bars[-1].console.print(Text(line), soft_wrap=True)


def draws_bars() -> bool:
    """Whether standard output is a terminal that can take back what was printed; CI's are not read live."""
    able = os.environ.get("TERM") not in ("dumb", "unknown")
    return sys.stdout.isatty() and able and not os.environ.get("CI")


class Progress:
    """While it is open: done of total, rate and time left; before the first result, for how long the workers start.

    On a terminal a bar, which goes when it is closed; elsewhere a line every few seconds.
    """

    def __init__(self, label: str, total: int, unit: str, *, already: int = 0):
        """`already` units were done by an earlier run: they count as done, but not in the rate. total 0: not known.

        `starting` may be set to what tells why there is no result yet; it is called often, and not after the first one.
        `live` may be set to what knows of results before `at` is told: seconds since the work began and units done since then,
        or None before it began. The rate is then theirs.
        """
        self._label, self._total, self._unit = label, total, unit
        self._already = self._done = self._live = already
        self._extra = ""
        self._opened = self._last = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first result came: workers start up before it
        self._display: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        self.starting: Callable[[], str] = lambda: ""
        self.live: Callable[[], tuple[float, int] | None] = lambda: None

    def __enter__(self) -> Progress:
        self._display = self._bar() if draws_bars() else self._lines()
        self._display.__enter__()
        _open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._display.__exit__(None, None, None)
        _open.remove(self)
        now = time.monotonic()
        at, base = self._first or (now, self._done)
        spans = (now - self._opened, at - self._opened, self._last - self._opened)
        seconds, first_s, last_s = (round(span, 3) for span in spans)
        done, first = self._done - self._already, base - self._already
        _timings.append(Timing(self._label, self._unit, done, seconds, first_s, first, last_s))

    def at(self, done: int, extra: str = "", *, total: int | None = None) -> None:
        """`done` units are complete; `total` where it was not known before."""
        self._total = self._total if total is None else total
        if done > self._done:
            self._last = time.monotonic()
            self._first = self._first or (self._last, done)
        self._done, self._extra = done, extra
        for follower in followers:
            follower(self._label, self._unit, done, self._total)

    def figures(self) -> dict[str, Any]:
        """See the function of this name."""
        now = time.monotonic()
        found: dict[str, Any] = {
            "label": self._label,
            "unit": self._unit,
            "done": self._done,
            "total": self._total,
        }
        found |= {"rate": None, "left_s": None, "open_s": round(now - self._opened, 1), "starting": ""}
        if self._first is None:
            found["starting"] = self.starting() or "workers are starting"
        elif self._done > self._first[1]:
            rate = (self._done - self._first[1]) / (now - self._first[0])
            left = round((self._total - self._done) / rate, 1) if self._total else None
            found |= {"rate": round(rate, 3), "left_s": left}
        return found

    @contextlib.contextmanager
    def _lines(self) -> Iterator[None]:
        stop = threading.Event()

        def tick() -> None:
            while not stop.wait(EVERY_S):
                if self._first is None or self._done < self._total or not self._total:
                    say(f"  {self._label}: {self._line(', ', ', ')}")

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @contextlib.contextmanager
    def _bar(self) -> Iterator[None]:
        from rich.console import Console
        from rich.live import Live

        live = Live(
            console=_bars[-1].console if _bars else Console(),
            get_renderable=self._row,
            transient=True,
            redirect_stderr=sys.stderr.isatty(),  # otherwise errors in a file would go to the terminal
        )
        with live:
            live.console.show_cursor()  # rich hides it, and a killed process could not show it again
            _bars.append(live)
            try:
                yield
            finally:
                _bars.remove(live)

    def _row(self) -> Table:
        """Label, bar and numbers; what does not fit into one line is cut off."""
        from rich.markup import escape
        from rich.progress_bar import ProgressBar
        from rich.table import Column, Table

        line = self._line("  ", " · ")
        open_end = self._first is None or not self._total
        bar = ProgressBar(None if open_end else self._total, max(self._done, self._live), width=BAR_WIDTH)
        cut = {"no_wrap": True, "overflow": "ellipsis"}
        row = Table.grid(Column(no_wrap=True), Column(min_width=BAR_WIDTH), Column(**cut), padding=(0, 1))
        row.add_row(f"  {escape(self._label)}", bar, escape(line))
        return row

    def _line(self, gap: str, before_extra: str) -> str:
        now = time.monotonic()
        if live := self.live():
            seconds, units = live
            self._first = (now - seconds, self._already)
            self._live = self._already + units
        if self._first is None:
            waits = self.starting()
            return f"workers are starting, {now - self._opened:.0f} s" + (f": {waits}" if waits else "")
        since, base = self._first
        of = f"/{self._total:,}" if self._total else ""
        done = max(self._done, self._live)
        numbers = [f"{done:,}{of} {self._unit}"]
        if done > base:
            rate = (done - base) / max(now - since, 1e-9)
            numbers.append(f"{rate:,.1f}/s")
            if self._total:
                numbers.append(f"{timedelta(seconds=round((self._total - done) / rate))} left")
        elif live:
            numbers.append(f"the first are under way, {live[0]:.0f} s")
        return gap.join(numbers) + (f"{before_extra}{self._extra}" if self._extra else "")
