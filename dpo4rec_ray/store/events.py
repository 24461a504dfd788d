"""events/SESSION.jsonl of a run: one structured line per event, for log collectors and for those who look into a failure.

A session is one driver. It alone writes its file, whole at every event, because objects of an object store cannot be appended
to; a run has some tens of events, and what is worth counting per text or step is a metric. Workers write none: the driver
notes what it hears of them, under their node.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from dpo4rec_ray.errors import first_line
from dpo4rec_ray.storage.places import write_text
from dpo4rec_ray.store.artifacts import RunDir

FOLDER = "events"


class EventLog:
    """The events of this driver. Safe to use from several threads."""

    def __init__(self, store: RunDir):
        self.run, self.node, self.pid = store.root.name, socket.gethostname(), os.getpid()
        self.session = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{self.node}-{self.pid}"
        self.stage, self.round, self.stage_began = "", 0, time.time()
        self._store, self._lock = store, threading.Lock()
        self._lines: list[str] = []

    def note(self, event: str, **more: Any) -> None:
        """Add one line. `more` may name another `node` than the driver's. Storage that fails ends no run: the next event
        writes the lines again."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "event": event, "run": self.run, "stage": self.stage, "round": self.round}
        line |= {"node": self.node, "pid": self.pid, **more}
        with self._lock:
            self._lines.append(json.dumps(line, default=str) + "\n")
            with contextlib.suppress(OSError):
                self._write("".join(self._lines))

    def _write(self, text: str) -> None:
        file = self._store.root / FOLDER / f"{self.session}.jsonl"
        file.parent.mkdir(exist_ok=True)
        write_text(file, text)


_log: EventLog | None = None


def note(event: str, **more: Any) -> None:
    """Add an event to the log of this driver, if it keeps one (`recorded`)."""
    if _log is not None:
        _log.note(event, **more)


def entered(stage: str, round_id: int) -> None:
    """From now on events belong to this stage and round."""
    if _log is not None:
        _log.stage, _log.round, _log.stage_began = stage, round_id, time.time()


@contextlib.contextmanager
def recorded(store: RunDir) -> Iterator[EventLog]:
    """Keep a log of what `note` gets, with the start and the end of the run."""
    global _log
    _log = log = EventLog(store)
    log.note("run_started")
    try:
        yield log
    except BaseException as error:
        log.note("run_failed" if isinstance(error, Exception) else "run_interrupted", error=first_line(error))
        raise
    else:
        log.note("run_finished")
    finally:
        _log = None


def read_events(store: RunDir) -> list[dict[str, Any]]:
    """All events of a run, in the order of its sessions."""
    files = sorted((store.root / FOLDER).glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
