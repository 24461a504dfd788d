"""One Ray task per partition of users, and what the driver makes of their answers: the k-core and the cuts in time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dpo4rec_ray.config.data import DataSection
from dpo4rec_ray.config.placed import Placed
from dpo4rec_ray.core.kcore import ItemCounts, merge_counts
from dpo4rec_ray.core.time_windows import TimeCuts
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.prepare.data_report import DataReport
from dpo4rec_ray.prepare.partition_events import NUM_BINS, Counted, collect, peel, time_histogram, time_range
from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.workers.needs import Needs


def each(
    label: str, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], where: Placed
) -> Iterator[tuple[int, Any]]:
    """Run a function on Ray with the arguments of each task: (place of the task, result) as they come.

    Ray replaces references among the arguments by their values. where: what a task's node must have.
    """
    import ray

    remote = ray.remote(**Needs.of(where, 1).options())(function)
    place_of = {remote.remote(*task): place for place, task in enumerate(tasks)}
    left = list(place_of)
    with Progress(label, len(tasks), "partitions") as progress:
        while left:
            (ref,), left = ray.wait(left, num_returns=1)
            progress.at(len(tasks) - len(left))
            yield place_of.pop(ref), ray.get(ref)


def in_order(
    label: str, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], where: Placed
) -> list[Any]:
    """The results of `each` in the order of the tasks."""
    return [result for _, result in sorted(each(label, function, tasks, where), key=lambda found: found[0])]


def shared(value: Any) -> Any:
    """A reference to what every task needs: the object store holds it once, not once per task."""
    import ray

    return ray.put(value)


def counted(
    label: str, function: Callable[..., Counted], tasks: Sequence[tuple[Any, ...]], where: Placed
) -> tuple[ItemCounts, list[Counted]]:
    """Run a counting function on every partition: the items of all partitions, and the other counts of each."""
    merged = ItemCounts(np.zeros(0, np.uint64), np.zeros(0, np.int64))
    waiting: list[ItemCounts] = []
    counts: list[Any] = [None] * len(tasks)
    for place, one in each(label, function, tasks, where):
        waiting.append(one.items)
        counts[place] = replace(one, items=None)
        if sum(len(items.keys) for items in waiting) > max(2**22, len(merged.keys)):
            merged, waiting = merge_counts([merged, *waiting]), []
    return merge_counts([merged, *waiting]), counts


def k_core(
    work: Place, num_partitions: int, user_core: int, data: DataSection, report: DataReport
) -> tuple[ItemCounts, list[Counted]]:
    """Collect every partition, then peel until all users have `user_core` events and all items `data.item_core`.

    Raises:
        UserError: no event is left.
    """
    rows_kept, num_blocks = report.counts["events"].rows_kept, report.counts["events"].num_blocks
    order = (data.protocol, data.keeps_repeated_events)
    tasks = [(work, p, num_blocks, *order, user_core) for p in range(num_partitions)]
    items, counts = counted("prepare: sorting", collect, tasks, data)
    collected = sum(one.num_collected for one in counts)
    if collected != rows_kept:
        raise RuntimeError(f"{rows_kept} events were read, {collected} arrived in partitions")
    report.num_repeated = sum(one.num_repeated for one in counts)
    report.keeps_repeated = data.keeps_repeated_events
    report.times = _range([one.times for one in counts if one.times])
    report.ratings = _range([one.ratings for one in counts if one.ratings])
    while len(dead := items.keys[items.counts < data.item_core]):
        dead_ref = shared(dead)
        tasks = [(work, p, dead_ref, user_core) for p in range(num_partitions)]
        items, counts = counted("prepare: k-core", peel, tasks, data)
    report.num_in_core = sum(one.num_events for one in counts)
    if collected and not report.num_in_core:
        raise UserError(
            f"none of {collected} events is left: no user has {user_core} events, or data.user_core = {data.user_core} "
            f"and data.item_core = {data.item_core} are too high for this dataset"
        )
    return items, counts


def _range(ranges: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    return min((low for low, _ in ranges), default=0), max((high for _, high in ranges), default=0)


def cuts_in_time(work: Place, num_partitions: int, data: DataSection) -> TimeCuts:
    """Test time holds the last `data.test_frac` of all events, validation time the last `data.valid_frac` of what comes before
    the first window that is not known.

    Raises:
        UserError: the events cannot be cut so.
    """
    tasks = [(work, p) for p in range(num_partitions)]
    ranges = [found for _, found in each("prepare: time", time_range, tasks, data) if found[1] >= found[0]]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    width = (high - low) // NUM_BINS + 1
    tasks = [(work, p, low, width) for p in range(num_partitions)]
    bins = sum(found for _, found in each("prepare: time", time_histogram, tasks, data))
    done = np.cumsum(bins) / np.sum(bins)
    windows = max(1, data.drift_windows)
    tests = [1 - data.test_frac * (1 - window / windows) for window in range(windows)]
    shares = (tests[data.known_windows] * (1 - data.valid_frac), *tests)
    valid_s, *windows_s = (int(low + width * np.searchsorted(done, share)) for share in shares)
    ends = (low, valid_s, *windows_s[data.known_windows :], high + 1)
    if any(begin >= end for begin, end in itertools.pairwise(ends)) or len(set(windows_s)) < windows:
        raise UserError(
            f'data.protocol = "time": the events (from {low} to {high} s) cannot be cut in {len(ends) - 1} by time: there are '
            'too few, or nearly all have the same time; use more events or data.protocol = "user"'
        )
    return TimeCuts(valid_s, tuple(windows_s), data.known_windows)
