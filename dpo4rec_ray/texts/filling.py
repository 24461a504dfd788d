"""How full the writer of an actor is: the samples that its open shards wait for, and the users that are done inside them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class Filling:
    """Knows what shards have asked for, and from the writer how many samples it has finished. Safe to call from many threads."""

    def __init__(self, finished: Callable[[], int | None]):
        """finished: samples that the writer has finished since its start. None: not known, a shard's samples come at once."""
        self._of_writer = finished
        self._lock = threading.Lock()
        self._asked = self._returned = 0  # samples since the start
        self._shards = self._users = self._samples = 0  # of the shards that are open now

    @contextlib.contextmanager
    def shard(self, num_users: int, num_samples: int) -> Iterator[None]:
        """While the writer works on a shard (or a part of it)."""
        with self._lock:
            if not self._shards:  # what was counted before, by a process that died, say, counts no more
                self._asked = self._finished()
            self._open(1, num_users, num_samples)
            self._asked += num_samples
        try:
            yield
        finally:
            with self._lock:
                self._open(-1, -num_users, -num_samples)
                self._returned += num_samples

    def unfinished(self) -> int:
        """Samples that open shards wait for."""
        with self._lock:
            return self._unfinished()

    def users_done(self) -> int:
        """Users inside open shards, by their share of the finished samples."""
        with self._lock:
            done = self._samples - self._unfinished()
            return -(-self._users * done // self._samples) if done else 0

    def _unfinished(self) -> int:
        return min(self._samples, max(0, self._asked - self._finished()))

    def _finished(self) -> int:
        found = self._of_writer()
        return self._returned if found is None else found

    def _open(self, shards: int, users: int, samples: int) -> None:
        self._shards += shards
        self._users += users
        self._samples += samples
