"""Adaptive batching: what waits while a batch is computed becomes the next one, so an idle service waits for nothing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Overloaded(Exception):
    """More waits than would be answered in time."""


class Batcher(Generic[Item, Answer]):
    """Calls `work` on lists of at most `max_batch` items in one thread; at most `max_waiting` wait."""

    def __init__(
        self, work: Callable[[Sequence[Item]], Sequence[Answer]], max_batch: int, max_waiting: int
    ) -> None:
        self._work, self._max_batch, self._max_waiting = work, max_batch, max_waiting
        self._waiting: deque[tuple[Item, asyncio.Future[Answer]]] = deque()
        self._running = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rank")

    async def __call__(self, item: Item) -> Answer:
        """The item's answer. Raises Overloaded, or what `work` raised."""
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((item, future))
        if not self._running:
            self._running = True
            self._task = loop.create_task(self._run())
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                size = min(len(self._waiting), self._max_batch)
                batch = [self._waiting.popleft() for _ in range(size)]
                batch = [one for one in batch if not one[1].done()]  # the caller has gone
                try:
                    answers = await loop.run_in_executor(
                        self._thread, self._work, [item for item, _ in batch]
                    )
                    for (_, future), answer in zip(batch, answers, strict=True):
                        if not future.done():
                            future.set_result(answer)
                except Exception as error:
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(error)
        finally:
            self._running = False
