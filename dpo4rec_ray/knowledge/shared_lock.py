"""A lock that lets many threads in together, or one thread alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class SharedLock:
    """Any number of threads in `shared`, or one thread in `alone`. The thread in `alone` may enter `shared` as well."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._owner: int | None = None

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        if self._owner == threading.get_ident():  # a call inside `alone`
            yield
            return
        with self._condition:
            self._condition.wait_for(lambda: self._owner is None)
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: self._owner is None)
            self._owner = threading.get_ident()
            self._condition.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._condition:
                self._owner = None
                self._condition.notify_all()
