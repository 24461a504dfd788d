"""The events of one partition of users: in order, in the k-core, and counted by time.

Each function is an ordinary one that `partition_tasks.py` places on Ray, once per partition. A partition holds whole users
and a range of user keys. User ids count users in key order, so the user ids of a partition are a range too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo4rec_ray.core.kcore import ItemCounts, contains, count_items, keep_core_users
from dpo4rec_ray.core.keys import Keys, mix
from dpo4rec_ray.prepare.partition_files import (
    Alive,
    block_files,
    read_alive,
    read_batch,
    read_core,
    write_arrow,
    write_names,
)
from dpo4rec_ray.storage.places import Place

DAY_S = 86400
# Bins of the histogram of times, from which the cuts in time are read.
NUM_BINS = 100_000
_NUMBERS = {
    "user_key": np.uint64,
    "item_key": np.uint64,
    "order": np.int64,
    "rating": np.float32,
    "timestamp_s": np.int64,
}


@dataclass(frozen=True)
class Counted:
    """What the driver must know of a partition.

    Attributes:
        num_collected: events before any was left out.
        num_repeated: events that are not the first of their user and item.
        times: earliest and latest time of the collected events in seconds; None without any.
        ratings: least and greatest rating of these.
        num_known_users: of a partition of logged lists: users with lists and events.
        splits: the splits that logged lists name; with None where some name no split.
    """

    items: ItemCounts
    num_events: int
    num_users: int
    num_collected: int = 0
    num_repeated: int = 0
    times: tuple[int, int] | None = None
    ratings: tuple[float, float] | None = None
    num_known_users: int = 0
    splits: frozenset[str | None] = frozenset()


def collect(
    work: Place, partition: int, num_blocks: int, protocol: str, keep_repeated: bool, user_core: int
) -> Counted:
    """Collect a partition's events in the order of the protocol, and begin its k-core.

    keep_repeated: all events of the same user and item are kept, else the earliest: by time, then by place in the file.
    """
    sources = block_files(work / "events", num_blocks)
    parts = [read_batch(file, partition, tuple(_NUMBERS)) for file in sources]
    columns = {
        name: np.concatenate([np.zeros(0, kind), *(part[name].to_numpy() for part in parts)])
        for name, kind in _NUMBERS.items()
    }
    lengths = [part.num_rows for part in parts]
    del parts
    user_key, item_key, order, times = (
        columns[name] for name in ("user_key", "item_key", "order", "timestamp_s")
    )
    time_key = times // DAY_S if protocol == "paper" else times
    kept = _first_of_each(user_key, item_key, time_key, order)
    num_repeated = len(user_key) - len(kept)
    if keep_repeated:
        kept = np.arange(len(user_key))
    alive = keep_core_users(user_key[kept], np.ones(len(kept), dtype=np.bool_), user_core)
    chosen = kept[alive]
    chosen = chosen[np.lexsort((order[chosen], time_key[chosen], user_key[chosen]))]
    write_arrow(
        work / "core" / f"{partition}.arrow",
        {name: columns[name][chosen] for name in columns if name != "order"},
    )
    write_names(work, partition, sources, lengths, chosen, user_key[chosen], item_key[chosen])
    _, user = np.unique(user_key[chosen], return_inverse=True)
    state = Alive(np.arange(len(chosen), dtype=np.int32), user.astype(np.int32), item_key[chosen])
    found = _keep(work, partition, state)
    if not len(user_key):
        return found
    ratings = columns["rating"]
    return replace(
        found,
        num_collected=len(user_key),
        num_repeated=num_repeated,
        times=(int(times.min()), int(times.max())),
        ratings=(float(ratings.min()), float(ratings.max())),
    )


def peel(work: Place, partition: int, dead_items: Keys, user_core: int) -> Counted:
    """One round of the k-core: remove the events of dead items, then the users with too few events left.

    A second call with the same items changes nothing, so Ray may retry the task.
    """
    alive = read_alive(work, partition)
    stays = keep_core_users(alive.user, ~contains(dead_items, alive.item_key), user_core)
    state = Alive(alive.place[stays], alive.user[stays], alive.item_key[stays])
    return _keep(work, partition, state)


def time_range(work: Place, partition: int) -> tuple[int, int]:
    """Earliest and latest time of the events in the k-core, in seconds; (0, -1) without any."""
    times = read_core(work, partition, ("timestamp_s",))["timestamp_s"]
    return (int(times.min()), int(times.max())) if len(times) else (0, -1)


def time_histogram(work: Place, partition: int, low: int, width: int) -> NDArray[np.int64]:
    """Events in the k-core per bin of `width` seconds from `low` on, [NUM_BINS]."""
    times = read_core(work, partition, ("timestamp_s",))["timestamp_s"]
    return np.bincount((times - low) // width, minlength=NUM_BINS)[:NUM_BINS]


def _keep(work: Place, partition: int, alive: Alive) -> Counted:
    """Write to disk which events are in the k-core, and count them. (The object store is too small for all partitions.)"""
    columns = {"place": alive.place, "user": alive.user, "item_key": alive.item_key}
    write_arrow(work / "alive" / f"{partition}.arrow", columns)
    num_users = 1 + int(np.count_nonzero(np.diff(alive.user))) if len(alive.user) else 0
    return Counted(count_items(alive.item_key), len(alive.place), num_users)


def _first_of_each(
    user_key: Keys, item_key: Keys, times: NDArray[Any], order: NDArray[Any]
) -> NDArray[np.int64]:
    """Places of the events that are the first of their user and item, ascending."""
    with np.errstate(over="ignore"):
        pair = mix(user_key + mix(item_key))
    in_order = np.sort(pair)
    repeated = np.unique(in_order[1:][in_order[1:] == in_order[:-1]])
    del in_order
    if not len(repeated):
        return np.arange(len(pair))
    # Only the few events of repeated pairs are sorted.
    several = np.flatnonzero(contains(repeated, pair))
    several = several[np.lexsort((order[several], times[several], pair[several]))]
    later = several[1:][pair[several[1:]] == pair[several[:-1]]]
    return np.setdiff1d(np.arange(len(pair)), later, assume_unique=True)
