"""heartbeat.json of a run: what its driver is doing, written every few seconds, for those who see the storage alone."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from dpo4rec_ray.errors import first_line
from dpo4rec_ray.store import progress
from dpo4rec_ray.store.artifacts import RunDir, write_json
from dpo4rec_ray.store.events import EventLog

HEARTBEAT = "heartbeat.json"
EVERY_S = 5.0
LOST_AFTER_S = 6 * EVERY_S  # without a sign of life


@dataclass
class Heartbeat:
    """A sign of life.

    Attributes:
        time, stage_began: seconds since 1970, by the clock of `node`.
        progress: `store.progress.figures` of what is open now.
        ended: "" while the driver is at work; "finished", "interrupted", or "failed: " and the reason.
    """

    time: float
    node: str
    pid: int
    session: str
    stage: str = ""
    round: int = 0
    stage_began: float = 0.0
    progress: list[dict[str, Any]] = field(default_factory=list)
    ended: str = ""

    def age(self, now: float) -> float:
        """Seconds since then; clocks of two machines differ a little, so it may not be taken to the second."""
        return max(0.0, now - self.time)


@contextlib.contextmanager
def beating(store: RunDir, log: EventLog) -> Iterator[None]:
    """Write a heartbeat every EVERY_S seconds, and one last that says how the work ended. Stage and round are the log's."""
    stop = threading.Event()
    beat = Heartbeat(0.0, log.node, log.pid, log.session)

    def write() -> None:
        beat.time = time.time()
        beat.stage, beat.round, beat.stage_began = log.stage, log.round, log.stage_began
        beat.progress = progress.figures()
        with contextlib.suppress(Exception):  # storage that fails for a while ends no run
            write_json(store.root / HEARTBEAT, asdict(beat))

    def run() -> None:
        write()
        while not stop.wait(EVERY_S):
            write()

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        beat.ended = f"failed: {first_line(error)}" if isinstance(error, Exception) else "interrupted"
        raise
    else:
        beat.ended = "finished"
    finally:
        stop.set()
        thread.join(timeout=EVERY_S)
        write()


def read_heartbeat(store: RunDir) -> Heartbeat | None:
    """The last sign of life; None where a run has none, or one of another version."""
    try:
        return Heartbeat(**json.loads((store.root / HEARTBEAT).read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None
