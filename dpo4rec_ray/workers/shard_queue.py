"""Shards wait in one queue, and a worker takes the next one when it has room: so none waits while another holds a queue.

Why not let Ray Data hand out the shards? It gives each actor as many rows as may be in flight, at once, and takes none back.
An engine works on many shards at the same time, so the first one that starts gets them all: of 13 shards the first of two
engines took 11. What may be in flight cannot follow an engine's room either, which changes with the length of its texts.

So the rows that Ray Data hands out are tickets. A call with a ticket waits until its worker has room, and only then takes the
next shard from the queue, an actor beside the driver. There are more tickets than shards, so that those which wait at a full
engine are missed by nobody; the last ones find the queue empty and give no row. The queue remembers what a ticket has taken:
Ray repeats the calls of an actor that died, with the same tickets, and they get the same shards, no others. So every shard is
done once, and one that ends engines is tried again under its own number (texts/attempts.py). For millions of users a ticket
takes several shards in turn, because the driver keeps some KiB for each call.

The last shards go to who is done with them first: a slow engine gets none that the others would have finished before it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

Row = dict[str, Any]
MAX_TICKETS = 512  # beside the spare ones; with more shards, a ticket takes several
LOOK_S = 0.1  # between two looks whether there is room
REPORT_S = 1.0  # between two reports of a worker
SILENT_S = 10.0  # a worker without a report for so long takes no part
LATER = -1  # in place of a shard: others would be done with it sooner


@runtime_checkable
class Roomy(Protocol):
    """A worker that does many shards at once, and says how full it is."""

    def has_room(self, shards: Set[int]) -> bool:
        """Whether it needs another shard to stay busy; shards: those that it has."""
        ...

    def users_inside(self) -> int:
        """Users that are done in shards that are not."""
        ...


@dataclass
class _Worker:
    """What the queue knows of a worker. Times are those of time.monotonic()."""

    began: float
    heard: float
    taken: int = 0  # shards
    ended: int = 0
    users: int = 0  # of the ended shards
    inside: int = 0  # users that are done in the others


class ShardQueue:
    """The queue, and how far its shards are. Knows no Ray: `FromQueue` asks it from other processes."""

    def __init__(self, shards: np.ndarray, per_ticket: int = 1, clock: Callable[[], float] = time.monotonic):
        """shards: int64 [S, 3] of shard, low, high; per_ticket: shards that a ticket may take."""
        self._shards, self._per_ticket, self._clock = shards, per_ticket, clock
        self._next = 0
        self._taken: defaultdict[int, list[int]] = defaultdict(list)
        self._ended: set[int] = set()
        self._workers: dict[str, _Worker] = {}

    def take(self, ticket: int, nth: int, worker: str) -> tuple[int, Row] | None:
        """The ticket's nth shard, the same one however often it is asked: its place in the queue, and its row.

        None: no more. (LATER, {}): ask again in a while.
        """
        taken = self._taken[ticket]
        if nth == len(taken):
            if self._next == len(self._shards) or nth == self._per_ticket:
                return None
            if self._sooner_elsewhere(worker):
                return LATER, {}
            taken.append(self._next)
            self._next += 1
            self._worker(worker).taken += 1
        names = ("shard", "low", "high")
        return taken[nth], dict(zip(names, self._shards[taken[nth]].tolist(), strict=True))

    def end(self, place: int, users: int, worker: str, inside: int) -> None:
        """The shard at this place is done, with so many users; `report` at the same time."""
        if place not in self._ended:
            self._ended.add(place)
            self._worker(worker).ended += 1
            self._worker(worker).users += users
        self.report(worker, inside)

    def report(self, worker: str, inside: int) -> None:
        """So many users are done in the shards that this worker has not finished."""
        if worker in self._workers:
            self._workers[worker].inside = inside
            self._workers[worker].heard = self._clock()

    def progress(self) -> tuple[float, int] | None:
        """Seconds since the first shard was taken, and users that are done; None before."""
        if not self._workers:
            return None
        began = min(worker.began for worker in self._workers.values())
        return self._clock() - began, sum(worker.users + worker.inside for worker in self._workers.values())

    def _worker(self, name: str) -> _Worker:
        now = self._clock()
        return self._workers.setdefault(name, _Worker(now, now))

    def _sooner_elsewhere(self, name: str) -> bool:
        """Whether the others would be done with all that is left before this worker was done with one more shard.

        They are expected to go on as fast as they were. The one that would be done first is never told to wait.
        """
        per_shard = sum(worker.users for worker in self._workers.values()) / max(1, len(self._ended))
        speeds: dict[str, tuple[float, float]] = {}  # shards per second, and shards in hand
        for key, worker in self._workers.items():
            done = worker.ended + (worker.inside / per_shard if per_shard else 0.0)
            if done and (key == name or self._clock() - worker.heard < SILENT_S):
                span = max(self._clock() - worker.began, 1e-9)
                speeds[key] = done / span, max(0.0, worker.taken - done)
        if name not in speeds:  # nobody knows how fast it is
            return False
        rate, in_hand = speeds.pop(name)
        until = (in_hand + 1) / rate
        others = sum(max(0, math.ceil(until * one - held) - 1) for one, held in speeds.values())
        return others >= len(self._shards) - self._next


def tickets(num_shards: int, num_workers: int, calls_at_once: int) -> tuple[int, int]:
    """Number of tickets, and of shards that each may take.

    All workers but one may be full, with as many tickets as they hold calls: so many are spare.
    """
    per_ticket = max(1, math.ceil(num_shards / MAX_TICKETS))
    return math.ceil(num_shards / per_ticket) + (num_workers - 1) * calls_at_once, per_ticket


class FromQueue:
    """A worker of a pool that takes its shards from the queue. Called with a ticket, yields the answers for its shards."""

    made_of: ClassVar[type[Callable[[Row], Row]]]

    def __init__(self, queue: Any, **arguments: Any):
        """queue: the actor of a `ShardQueue`; arguments: those of the class that does the work."""
        import ray

        self._queue, self._name = queue, ray.get_runtime_context().get_actor_id() or ""
        self._worker = self.made_of(**arguments)
        self._door, self._open = threading.Lock(), set[int]()
        threading.Thread(target=self._report, name="report", daemon=True).start()

    def __call__(self, row: Row) -> Iterator[Row]:
        nth = 0
        while found := self._take(int(row["ticket"]), nth):
            place, shard = found
            answer = self._worker(shard)
            self._open.discard(shard["shard"])
            users = answer.get("users") or answer.get("totals", {}).get("users", 0)
            self._queue.end.remote(place, int(users), self._name, self._inside())
            yield answer
            nth += 1

    def _take(self, ticket: int, nth: int) -> tuple[int, Row] | None:
        import ray

        with self._door:  # one after the other, so that each sees what the one before it has taken
            while True:
                if not isinstance(self._worker, Roomy) or self._worker.has_room(set(self._open)):
                    found: Any = ray.get(self._queue.take.remote(ticket, nth, self._name))
                    if found is None or found[0] != LATER:
                        break
                time.sleep(LOOK_S)
            if found is not None:
                self._open.add(found[1]["shard"])
            return found

    def _inside(self) -> int:
        return self._worker.users_inside() if isinstance(self._worker, Roomy) else 0

    def _report(self) -> None:
        while True:
            time.sleep(REPORT_S)
            self._queue.report.remote(self._name, self._inside())


def from_queue(worker: type[Callable[[Row], Row]]) -> type[FromQueue]:
    """`worker` as one that takes its shards from the queue, under the same name, which Ray shows."""
    return type(worker.__name__, (FromQueue,), {"made_of": worker})
