"""Adaptive batching: which items form a batch, which are refused, and which callers get an error."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest

from dpo4rec_ray.serving.batcher import QUIET_TURNS, Batcher, Overloaded


class Doubled:
    """Doubles numbers, and notes its batches and threads. A batch with a negative number fails."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: list[int] = []
        self.gate: threading.Event | None = None  # holds batches up

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.threads.append(threading.get_ident())
        if self.gate:
            assert self.gate.wait(10)
        if min(items) < 0:
            raise ArithmeticError(f"{min(items)} is below zero")
        return [2 * item for item in items]


def batcher(
    work: Callable[[Sequence[int]], Sequence[int]],
    max_batch: int = 4,
    max_waiting: int = 8,
    in_loop: int = 10**9,
) -> Batcher[int, int]:
    """A Batcher of numbers. The size of an item is its absolute value."""
    return Batcher(work, max_batch, max_waiting, abs, in_loop)


def test_one_item_is_a_batch_at_once() -> None:
    """No time is waited for, only a few turns of the loop."""
    work = Doubled()

    async def ask() -> int:
        task = asyncio.ensure_future(batcher(work)(3))
        for _ in range(QUIET_TURNS + 4):
            await asyncio.sleep(0)
        assert task.done()
        return await task

    assert asyncio.run(ask()) == 6
    assert work.batches == [[3]] and work.threads == [threading.get_ident()]


def test_what_comes_together_is_worked_on_together() -> None:
    """In order, in batches of at most max_batch. Each caller gets the answer to its item."""
    work = Doubled()

    async def ask() -> list[int]:
        ask = batcher(work, max_batch=3)
        return await asyncio.gather(*map(ask, range(8)))

    assert asyncio.run(ask()) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert work.batches == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_what_waits_behind_a_batch_becomes_the_next() -> None:
    work = Doubled()
    work.gate = threading.Event()

    async def ask() -> list[int]:
        ask = batcher(work, in_loop=0)
        first = asyncio.ensure_future(ask(1))
        while not work.batches:
            await asyncio.sleep(0.001)
        later = [asyncio.ensure_future(ask(item)) for item in (2, 3, 4)]
        await asyncio.sleep(0.01)
        assert work.batches == [[1]], "one batch at a time"
        work.gate.set()
        return await asyncio.gather(first, *later)

    assert asyncio.run(ask()) == [2, 4, 6, 8]
    assert work.batches == [[1], [2, 3, 4]]


def test_large_batches_leave_the_loop_alone() -> None:
    """By the sum of the sizes: 5 + 5 are too many for the loop's own thread, 10 alone is not."""
    work = Doubled()

    async def ask() -> None:
        ask = batcher(work, in_loop=9)
        assert await ask(9) == 18
        assert await asyncio.gather(ask(5), ask(5)) == [10, 10]
        work.gate = threading.Event()
        slow = asyncio.ensure_future(ask(10))
        while len(work.batches) < 3:
            await asyncio.sleep(0.001)  # the loop turns while the batch is worked on
        assert not slow.done()
        work.gate.set()
        assert await slow == 20

    asyncio.run(ask())
    own = threading.get_ident()
    assert [thread == own for thread in work.threads] == [True, False, False]


def test_too_many_are_refused_and_the_rest_is_answered() -> None:
    work = Doubled()

    async def ask() -> list[int | BaseException]:
        ask = batcher(work, max_batch=2, max_waiting=5)
        found = await asyncio.gather(*map(ask, range(9)), return_exceptions=True)
        assert await ask(7) == 14, "room again"
        return found

    found = asyncio.run(ask())
    assert found[:5] == [0, 2, 4, 6, 8]
    assert [type(one) for one in found[5:]] == [Overloaded] * 4


@pytest.mark.parametrize("in_loop", [0, 10**9])
def test_an_error_reaches_the_callers_of_its_batch_alone(in_loop: int) -> None:
    work = Doubled()

    async def ask() -> list[int | BaseException]:
        ask = batcher(work, max_batch=2, in_loop=in_loop)
        return await asyncio.gather(*map(ask, [1, 2, 3, -4, 5, 6]), return_exceptions=True)

    found = asyncio.run(ask())
    assert found[:2] == [2, 4] and found[4:] == [10, 12]
    assert [str(one) for one in found[2:4]] == ["-4 is below zero"] * 2


@pytest.mark.parametrize("in_loop", [0, 10**9])
def test_too_few_answers_are_an_error(in_loop: int) -> None:
    async def ask() -> list[int | BaseException]:
        ask = batcher(lambda items: [1], in_loop=in_loop)
        return await asyncio.gather(ask(1), ask(2), return_exceptions=True)

    assert isinstance(asyncio.run(ask())[1], ValueError)


@pytest.mark.parametrize("in_loop", [0, 10**9])
def test_callers_that_went_cost_nothing(in_loop: int) -> None:
    """If a caller gives up before its batch begins, its item is not computed; if later, nothing else changes."""
    work = Doubled()

    async def ask() -> list[int]:
        ask = batcher(work, in_loop=in_loop)
        tasks = [asyncio.ensure_future(ask(item)) for item in range(1, 6)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        tasks[4].cancel()
        kept = await asyncio.gather(tasks[0], *tasks[2:4])
        gone = asyncio.ensure_future(ask(6))
        await asyncio.sleep(0)
        gone.cancel()
        return [*kept, await ask(7)]

    assert asyncio.run(ask()) == [2, 6, 8, 14]
    assert work.batches == [[1, 3, 4], [7]]


def test_a_caller_that_goes_while_its_batch_runs() -> None:
    work = Doubled()
    work.gate = threading.Event()

    async def ask() -> list[int]:
        ask = batcher(work, in_loop=0)
        gone, kept = asyncio.ensure_future(ask(1)), asyncio.ensure_future(ask(2))
        while not work.batches:
            await asyncio.sleep(0.001)
        gone.cancel()
        work.gate.set()
        return [await kept, await ask(3)]

    assert asyncio.run(ask()) == [4, 6]


def test_all_callers_of_a_batch_may_go() -> None:
    """The batcher then rests, and starts again with the next item."""
    work = Doubled()

    async def ask() -> int:
        ask = batcher(work)
        for _ in range(3):
            task = asyncio.ensure_future(ask(1))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0.005)
        return await ask(2)

    assert asyncio.run(ask()) == 4 and work.batches == [[2]]
