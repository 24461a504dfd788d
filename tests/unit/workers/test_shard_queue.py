"""Who gets which shard: hand-worked cases with a clock of their own, then real actors, late, slow and killed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.workers.shard_queue import LATER, MAX_TICKETS, SILENT_S, ShardQueue, tickets
from dpo4rec_ray.workers.shards import Pool, run_shards, shard_ranges
from tests.conftest import local_ray, until


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def queue_of(num_shards: int, per_ticket: int = 1, users: int = 10) -> tuple[ShardQueue, Clock]:
    """Shards 7, 8, ... of 10 users each."""
    shards = [(7 + place, users * place, users * (place + 1)) for place in range(num_shards)]
    clock = Clock()
    return ShardQueue(np.array(shards, np.int64), per_ticket, clock), clock


def test_a_ticket_gets_the_same_shards_however_often_it_asks() -> None:
    queue, _ = queue_of(3, per_ticket=2)
    assert queue.take(0, 0, "a") == (0, {"shard": 7, "low": 0, "high": 10})
    assert queue.take(5, 0, "b") == (1, {"shard": 8, "low": 10, "high": 20})
    assert queue.take(0, 0, "a restarted") == (0, {"shard": 7, "low": 0, "high": 10})
    assert queue.take(0, 1, "a restarted") == (2, {"shard": 9, "low": 20, "high": 30})
    assert queue.take(5, 1, "b") is None, "the queue is empty"
    assert queue.take(0, 2, "a") is None, "the ticket has had its two"
    assert queue.take(5, 0, "b restarted") == (1, {"shard": 8, "low": 10, "high": 20})


def test_progress_counts_users_inside_shards_and_no_shard_twice() -> None:
    queue, clock = queue_of(4)
    assert queue.progress() is None
    for ticket, name in enumerate(("a", "a", "b")):
        queue.take(ticket, 0, name)
    clock.now += 5
    assert queue.progress() == (5.0, 0), "work has begun, nothing is done"
    queue.report("a", 3)
    queue.report("b", 4)
    assert queue.progress() == (5.0, 7)
    queue.end(0, 10, "a", 1)
    assert queue.progress() == (5.0, 10 + 1 + 4)
    queue.end(0, 10, "a", 0)
    assert queue.progress() == (5.0, 10 + 4), "a call that was repeated counts once"


def after_40_s(num_shards: int) -> ShardQueue:
    """a does a shard in 10 s, b in 20 s. After 40 s a has done 4 and holds 1, b has done 2 and holds 1."""
    queue, clock = queue_of(num_shards)
    for ticket in range(8):
        queue.take(ticket, 0, "b" if ticket in (1, 4, 7) else "a")
    clock.now += 40
    for place in (0, 2, 3, 5):
        queue.end(place, 10, "a", 0)
    for place in (1, 4):
        queue.end(place, 10, "b", 0)
    return queue


def test_the_last_shards_go_to_who_ends_first() -> None:
    """a does a shard in 10 s, b in 20 s. After 40 s a has done 4 and holds 1, b has done 2 and holds 1; 1 is left."""
    queue = after_40_s(9)
    # b would be done with it in 2 x 20 = 40 s, a in (1 + 1) x 10 = 20 s.
    assert queue.take(8, 0, "b") == (LATER, {})
    assert queue.take(9, 0, "a") == (8, {"shard": 15, "low": 80, "high": 90})
    assert queue.take(8, 0, "b") is None


def test_a_slow_worker_gets_what_the_others_have_no_time_for() -> None:
    """As before, with 3 left: in b's 40 s a is done with what it holds and two of them, but not before b."""
    queue = after_40_s(11)
    found = queue.take(8, 0, "b")
    assert found is not None and found[0] == 8


def test_equal_workers_never_wait_for_each_other() -> None:
    queue, clock = queue_of(7)
    for ticket in range(6):
        queue.take(ticket, 0, "abc"[ticket % 3])
    clock.now += 10
    for place in range(3):
        queue.end(place, 10, "abc"[place], 0)
    found = queue.take(6, 0, "a")
    assert found is not None and found[0] == 6


def test_nobody_waits_for_a_worker_that_is_silent_or_has_shown_nothing() -> None:
    queue, clock = queue_of(4)
    queue.take(0, 0, "fast")
    queue.take(1, 0, "slow")
    clock.now += 10
    queue.end(0, 10, "fast", 0)
    clock.now += 10
    queue.report("slow", 5)
    queue.report("fast", 0)
    queue.take(2, 0, "new")  # nobody knows how fast it is: it gets a shard
    assert queue.take(3, 0, "slow") == (LATER, {}), "it needs 60 s for 1.5 shards, the fast one 20 s for one"
    clock.now += SILENT_S  # the fast one has not been heard from
    found = queue.take(3, 0, "slow")
    assert found is not None and found[0] == 3


@pytest.mark.parametrize(
    ("shards", "workers", "expected"),
    [
        (13, 1, (13, 1)),
        (13, 2, (18, 1)),
        (MAX_TICKETS, 3, (MAX_TICKETS + 10, 1)),
        (MAX_TICKETS + 1, 1, (257, 2)),
    ],
)
def test_tickets(shards: int, workers: int, expected: tuple[int, int]) -> None:
    """One per shard, and as many as the other workers may hold while they are full."""
    assert tickets(shards, workers, 5) == expected


def engine() -> type:
    """Made inside a function, so that it travels by value."""

    class Engine:
        """Works on two shards at once, 0.3 s each; the second one to start is late, and dies once in its first shard."""

        def __init__(self, folder: str, late_s: float):
            import os
            import time
            from pathlib import Path

            self._folder = Path(folder)
            number = 0
            while True:
                try:
                    os.close(os.open(self._folder / f"engine-{number}", os.O_CREAT | os.O_EXCL))
                    break
                except FileExistsError:
                    number += 1
            self._number = number
            time.sleep(late_s * (number == 1))

        def has_room(self, shards: set[int]) -> bool:
            return len(shards) < 2

        def users_inside(self) -> int:
            return 0

        def __call__(self, row: dict) -> dict:
            import os
            import time

            if self._number == 1:
                os._exit(1)
            with open(self._folder / "done", "a") as lines:
                lines.write(f"{self._number} {row['shard']}\n")
            time.sleep(0.3)
            return {"shard": row["shard"], "users": row["high"] - row["low"], "engine": self._number}

    return Engine


@pytest.fixture(scope="module")
def ray_local() -> Iterator[None]:
    with local_ray(2):
        yield


@pytest.mark.ray
@pytest.mark.parametrize("per_ticket", [1, 2])
def test_a_late_engine_that_dies_gets_its_share_and_no_shard_is_lost_or_doubled(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_ticket: int
) -> None:
    """Each engine has nine calls in hand and works on two shards."""
    from dpo4rec_ray.workers import shard_queue

    num_shards = 60
    monkeypatch.setattr(shard_queue, "MAX_TICKETS", num_shards // per_ticket)
    pool = Pool(
        engine(),
        {"folder": str(tmp_path), "late_s": 2.0},
        size=2,
        num_cpus=1,
        shards_at_once=9,
        max_restarts=3,
    )
    progress = Progress("test", 2 * num_shards, "users")
    answers, live = [], []
    for answer in run_shards(shard_ranges(2 * num_shards, 2), [pool], progress):
        answers.append(answer)
        live.append(progress.live())
    assert sorted(row["shard"] for row in answers) == list(range(num_shards))
    done = [line.split() for line in (tmp_path / "done").read_text().splitlines()]
    assert len(done) == num_shards, "none was done twice"
    by_engine = Counter(number for number, _ in done)
    assert set(by_engine) == {"0", "2"}, "the second one died, and its successor is number 2"
    assert by_engine["2"] >= 5
    assert any(one is not None for one in live)
    until(
        lambda: progress.live() is None, 20
    )  # the queue ends with the stage, and Ray ends an actor in the background
