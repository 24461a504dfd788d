from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo4rec_ray.policy.order import WINDOW_STEPS, Step, StepOrder

# rows per micro-batch and worker, workers: all can make up a step of 8 rows
WORLDS = [(1, 1), (8, 1), (4, 2), (2, 3)]


@st.composite
def orders(draw: st.DrawFn) -> StepOrder:
    num_rows = draw(st.integers(1, 60))
    lengths = draw(st.none() | st.lists(st.integers(1, 30), min_size=num_rows, max_size=num_rows))
    return StepOrder(
        num_rows=num_rows,
        global_batch_size=draw(st.integers(1, 9)),
        epochs=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**31)),
        lengths=lengths,
    )


WORLD = st.tuples(st.integers(1, 9), st.integers(1, 4))


def steps(order: StepOrder, batch_size: int = 1, world: int = 1, start: int = 0) -> list[list[Step]]:
    """[step][rank]"""
    workers = [order.steps(batch_size, rank, world, start) for rank in range(world)]
    return [list(step) for step in zip(*workers, strict=True)]


def test_by_hand() -> None:
    """7 rows, 4 to a step, 2 workers with micro-batches of 1: 2 steps an epoch, 2 micro-batches a step.

    Worker r takes places r, 2 + r of a step; the last step has 3 rows, so worker 1 ends with an empty micro-batch.
    """
    order = StepOrder(num_rows=7, global_batch_size=4, epochs=2, seed=5)
    assert (order.steps_per_epoch, order.num_steps, order.micro_batches(1, 2)) == (2, 4, 2)
    drawn = np.random.default_rng([5, 1]).permutation(7).tolist()
    _, _, first, last = steps(order, batch_size=1, world=2)
    assert [(one.index, one.epoch, one.rows) for one in first] == [(2, 1, drawn[:4])] * 2
    assert [(one.index, one.epoch, one.rows) for one in last] == [(3, 1, drawn[4:])] * 2
    assert [one.shares for one in first] == [[[drawn[0]], [drawn[2]]], [[drawn[1]], [drawn[3]]]]
    assert [one.shares for one in last] == [[[drawn[4]], [drawn[6]]], [[drawn[5]], []]]


def test_fewer_rows_than_a_step_holds() -> None:
    """3 rows, steps of 8: one step an epoch of 3 rows, and no micro-batch that is empty for every worker."""
    order = StepOrder(num_rows=3, global_batch_size=8, epochs=2, seed=0)
    assert (order.num_steps, order.micro_batches(2, 1)) == (2, 2)
    assert [len(share) for (step,) in steps(order, batch_size=2) for share in step.shares] == [2, 1, 2, 1]


@given(order=orders())
def test_every_row_once_an_epoch(order: StepOrder) -> None:
    """In steps of `global_batch_size` rows but for the epoch's last; numbered from 0; another order in each epoch."""
    found = [step for (step,) in steps(order)]
    assert [step.index for step in found] == list(range(order.num_steps))
    for epoch, group in itertools.groupby(found, key=lambda step: step.epoch):
        own = list(group)
        assert sorted(row for step in own for row in step.rows) == list(range(order.num_rows))
        assert all(len(step.rows) == order.global_batch_size for step in own[:-1])
        assert [step.index // order.steps_per_epoch for step in own] == [epoch] * len(own)
    assert found[-1].epoch == order.epochs - 1


@given(order=orders(), world=WORLD)
def test_shares_partition_the_rows(order: StepOrder, world: tuple[int, int]) -> None:
    """Micro-batch m of all workers is the m-th piece of the step: no row twice, none left, as many on each worker."""
    batch_size, workers = world
    for step in steps(order, batch_size, workers):
        assert len({(one.index, one.epoch, tuple(one.rows)) for one in step}) == 1
        assert {len(one.shares) for one in step} == {order.micro_batches(batch_size, workers)}
        micro = zip(*(one.shares for one in step), strict=True)
        assert [row for shares in micro for share in shares for row in share] == step[0].rows
        assert all(len(share) <= batch_size for one in step for share in one.shares)


@pytest.mark.parametrize("lengths", [None, list(range(100, 153))], ids=["drawn", "sorted"])
@pytest.mark.parametrize(("batch_size", "world"), WORLDS)
def test_the_rows_of_a_step_do_not_depend_on_the_world(
    lengths: list[int] | None, batch_size: int, world: int
) -> None:
    order = StepOrder(num_rows=53, global_batch_size=8, epochs=2, seed=1, lengths=lengths)
    alone = [step.rows for (step,) in steps(order)]
    assert [step[0].rows for step in steps(order, batch_size, world)] == alone
    assert len(alone) == 14


@given(order=orders(), world=WORLD, data=st.data())
def test_a_later_start_continues(order: StepOrder, world: tuple[int, int], data: st.DataObject) -> None:
    """Steps from `start` on are those of the whole run, on other workers too; from the end there are none."""
    start = data.draw(st.integers(0, order.num_steps))
    assert steps(order, *world, start=start) == steps(order, *world)[start:]
    rows = [step[0].rows for step in steps(order, *world, start=start)]
    assert rows == [step.rows for (step,) in steps(order)][start:]


@given(order=orders())
def test_the_seed_decides(order: StepOrder) -> None:
    again = StepOrder(order.num_rows, order.global_batch_size, order.epochs, order.seed, order.lengths)
    assert steps(again) == steps(order)


def test_epochs_and_seeds_differ() -> None:
    """64 rows: two of 64! orders that are equal do not happen."""
    epochs = [
        [
            row
            for (step,) in steps(StepOrder(64, 8, epochs=2, seed=seed))
            if step.epoch == epoch
            for row in step.rows
        ]
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple(rows) for rows in epochs}) == 4


@given(order=orders().filter(lambda order: order.lengths is not None))
def test_steps_of_a_window_hold_neighbours_in_length(order: StepOrder) -> None:
    """16 steps hold the rows of 16 steps of the drawn order; sorted by length, their ranges do not overlap."""
    assert order.lengths is not None
    drawn = StepOrder(order.num_rows, order.global_batch_size, order.epochs, order.seed)
    window = WINDOW_STEPS
    for epoch in range(order.epochs):
        ours, theirs = (
            [step.rows for (step,) in steps(one) if step.epoch == epoch] for one in (order, drawn)
        )
        for first in range(0, len(ours), window):
            own = ours[first : first + window]
            rows, same = (sorted(itertools.chain(*part)) for part in (own, theirs[first : first + window]))
            assert rows == same
            ranges = sorted(
                (min(rows), max(rows)) for rows in ([order.lengths[row] for row in s] for s in own)
            )
            assert all(low[1] <= high[0] for low, high in itertools.pairwise(ranges))


def test_sorted_steps_come_in_no_order_of_length() -> None:
    """A schedule from long to short would tie the learning rate to the length."""
    lengths = np.random.default_rng(0).integers(10, 500, size=640)
    order = StepOrder(640, 8, epochs=1, seed=0, lengths=lengths.tolist())
    means = np.array([np.mean(lengths[step.rows]) for (step,) in steps(order)]).reshape(-1, WINDOW_STEPS)
    slopes = [np.corrcoef(window, np.arange(WINDOW_STEPS))[0, 1] for window in means]
    assert abs(np.mean(slopes)) < 0.3
    padding = np.mean([lengths[step.rows].max() - lengths[step.rows].mean() for (step,) in steps(order)])
    drawn = StepOrder(640, 8, epochs=1, seed=0)
    assert padding < 0.1 * np.mean(
        [lengths[step.rows].max() - lengths[step.rows].mean() for (step,) in steps(drawn)]
    )
