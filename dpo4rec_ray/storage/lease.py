"""One writer at a time in a folder, on any storage and between machines: a lease with a heartbeat.

Leases are files `.lease/NUMBER.json` that can only be created where there is none, so that of several takers one succeeds. The
highest number holds. Its holder rewrites the file every few seconds and, at the end, writes into it that it let go; whoever finds
one that was let go, that does not change, or whose process on the same machine is gone, takes the next number. The file of the
last holder stays: were a number ever used again, a taker that was slow could create it beside a holder that started from the
beginning. No clock of another machine is believed. A holder that was cut off and finds a higher number, or its own file gone, has
lost the folder and must stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

from dpo4rec_ray.storage.places import Place, create, remove, write_text

FOLDER = ".lease"
BEAT_S = 4.0
GONE_AFTER_S = 3.5 * BEAT_S  # without a change
POLL_S = 0.3


class Held(Exception):
    """Another process holds the folder; the message says which."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        machine: the kernel that runs it and its space of process ids: only there its pid means something.
        began: when the process did, so that another one with the same pid is not mistaken for it (`_began`).
        beats: how often it said that it lives.
        ended: it let go of the folder.
    """

    host: str
    pid: int
    machine: str
    began: float
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    beats: int = 0
    ended: bool = False

    @classmethod
    def myself(cls) -> Holder:
        return cls(socket.gethostname(), os.getpid(), _machine(), _began(os.getpid()))

    @property
    def words(self) -> str:
        return f"process {self.pid} on {self.host}"

    def known_gone(self) -> bool:
        """Whether it let go, or ran on this machine and does no longer."""
        return self.ended or (self.machine == _machine() and not self._lives())

    def known_alive(self) -> bool:
        """Whether it holds on and runs on this machine."""
        return not self.ended and self.machine == _machine() and self._lives()

    def _lives(self) -> bool:
        try:
            return (
                _began(self.pid) == self.began and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
            )
        except (OSError, psutil.Error):
            return False


@contextlib.contextmanager
def lease(
    folder: Place,
    *,
    lost: Callable[[], None],
    wait: bool = False,
    waiting: Callable[[str], None] = lambda words: None,
) -> Iterator[None]:
    """Hold the folder while the block runs.

    Args:
        lost: called from another thread if someone else took the folder over.
        wait: for a living holder too, as for one whose life is not known yet.
        waiting: called once with who is waited for.

    Raises:
        Held: a living process holds it (without `wait`).
    """
    leases = folder / FOLDER
    leases.mkdir(parents=True, exist_ok=True)
    me = Holder.myself()
    number = _take(leases, me, wait, waiting)
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(leases, number, me, stop, lost), daemon=True)
    beating.start()
    try:
        yield
    finally:
        stop.set()
        beating.join()
        # A lease that stays is taken over, and its error says less than what ended the block.
        with contextlib.suppress(Exception):
            if _still_mine(leases, number, me):
                _write(leases, number, replace(me, ended=True))


def _take(leases: Place, me: Holder, wait: bool, waiting: Callable[[str], None]) -> int:
    """The number under which the folder is ours."""
    seen: tuple[str, int] | None = None
    since, told = time.monotonic(), False
    while True:
        numbers = _numbers(leases)
        try:
            holder = _read(leases, numbers[-1]) if numbers else None
        except FileNotFoundError:
            continue  # taken over while it was looked at
        free = holder is None or holder.known_gone()
        if not free and holder is not None:
            state = (holder.token, holder.beats)
            if state != seen:
                if not wait and (holder.known_alive() or (seen is not None and seen[0] == holder.token)):
                    raise Held(holder.words)
                seen, since = state, time.monotonic()
            free = time.monotonic() - since > GONE_AFTER_S and not holder.known_alive()
        if free:
            number = numbers[-1] + 1 if numbers else 1
            if create(_file(leases, number), json.dumps(asdict(me)).encode()):
                if _numbers(leases)[-1:] == [number]:
                    for old in numbers:
                        remove(_file(leases, old))
                    return number
                remove(_file(leases, number))  # others took this number and the next in the meantime
            continue
        if holder is not None and not told:
            waiting(holder.words)
            told = True
        time.sleep(POLL_S)


def _beat(leases: Place, number: int, me: Holder, stop: threading.Event, lost: Callable[[], None]) -> None:
    beats = 0
    while not stop.wait(BEAT_S):
        try:
            if not _still_mine(leases, number, me):
                lost()
                return
            beats += 1
            _write(leases, number, replace(me, beats=beats))
        except Exception:  # each store has errors of its own
            continue  # it does not answer; the next beat asks again who holds


def _still_mine(leases: Place, number: int, me: Holder) -> bool:
    try:
        found = _read(leases, number)
    except FileNotFoundError:
        return False
    return found.token == me.token and _numbers(leases)[-1:] == [number]


def _numbers(leases: Place) -> list[int]:
    return sorted(int(file.stem) for file in leases.glob("*.json"))


def _file(leases: Place, number: int) -> Place:
    return leases / f"{number:06d}.json"


def _read(leases: Place, number: int) -> Holder:
    """Who wrote the file. What cannot be read is somebody elsewhere, who lives as long as it changes.

    Raises:
        FileNotFoundError
    """
    text = _file(leases, number).read_text(encoding="utf-8", errors="replace")
    try:
        return Holder(**json.loads(text))
    except (json.JSONDecodeError, TypeError):
        return Holder("a machine that cannot be told", 0, "", 0.0, token="", beats=zlib.crc32(text.encode()))


def _write(leases: Place, number: int, holder: Holder) -> None:
    write_text(_file(leases, number), json.dumps(asdict(holder)))


def _began(pid: int) -> float:
    """When a process began, in ticks since the machine's start: the time of day, which psutil gives, may be set meanwhile.

    Raises:
        OSError: there is no such process.
    """
    if not os.path.exists("/proc/self/stat"):
        return psutil.Process(pid).create_time()
    return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _machine() -> str:
    """This kernel since it was booted, and this space of process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    text = boot.read_text().strip() if boot.exists() else socket.gethostname()
    return f"{text} {os.stat('/proc/self/ns/pid').st_ino if os.path.exists('/proc/self/ns/pid') else ''}"
