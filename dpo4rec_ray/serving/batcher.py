"""Adaptive batching: what arrives while a batch is computed is the next batch. An idle service waits for nothing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")
# A batch starts after this many turns of the event loop without a new item: about 10 microseconds.
QUIET_TURNS = 3


class Overloaded(Exception):
    """Too many items wait."""


class Batcher(Generic[Item, Answer]):
    """Calls `work` with batches, one after the other.

    Small batches run in the thread of the event loop: to hand them to another thread costs more than to compute them. Large
    ones run in a thread of their own, so that the loop goes on.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Answer | Exception]],
        max_batch: int,
        max_waiting: int,
        size: Callable[[Item], int],
        max_in_loop: int,
    ) -> None:
        """
        Args:
            work: a batch -> one answer per item. It returns an exception as the answer of an item that has none; an
                exception that it raises is the answer of all items.
            max_batch: most items of a batch.
            max_waiting: most items that wait.
            size: the cost of an item.
            max_in_loop: batches that cost more run in a thread.
        """
        self._work, self._max_batch, self._max_waiting = work, max_batch, max_waiting
        self._size, self._max_in_loop = size, max_in_loop
        self._waiting: deque[tuple[Item, asyncio.Future[Answer]]] = deque()
        self._running = False
        self._seen = self._quiet = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rank")

    async def __call__(self, item: Item) -> Answer:
        """The answer to an item. Raises Overloaded, or the exception that `work` gave."""
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((item, future))
        if not self._running:
            self._running = True
            loop.call_soon(self._next)
        return await future

    @property
    def busy(self) -> bool:
        """Whether anything is computed or waits."""
        return self._running

    def _next(self) -> None:
        """Start the next batch. It first waits some turns of the loop, so that requests that are being parsed can join."""
        self._quiet = self._quiet + 1 if len(self._waiting) == self._seen else 0
        self._seen = len(self._waiting)
        if self._quiet < QUIET_TURNS and self._seen < self._max_batch:
            asyncio.get_running_loop().call_soon(self._next)
            return
        self._seen = self._quiet = 0
        batch: list[tuple[Item, asyncio.Future[Answer]]] = []
        while self._waiting and len(batch) < self._max_batch:
            one = self._waiting.popleft()
            if not one[1].done():  # else the caller has given up
                batch.append(one)
        if not batch:
            self._running = False
            return
        items = [item for item, _ in batch]
        futures = [future for _, future in batch]
        loop = asyncio.get_running_loop()
        if sum(map(self._size, items)) > self._max_in_loop:
            done = loop.run_in_executor(self._thread, self._work, items)
            done.add_done_callback(lambda done: self._end(futures, done.result))
        else:
            self._end(futures, lambda: self._work(items))

    def _end(
        self, futures: Sequence[asyncio.Future[Answer]], result: Callable[[], Sequence[Answer | Exception]]
    ) -> None:
        try:
            for future, answer in zip(futures, result(), strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
        except Exception as error:
            for future in futures:
                if not future.done():
                    future.set_exception(error)
        finally:
            asyncio.get_running_loop().call_soon(self._next)
