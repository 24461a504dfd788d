"""What is done with one partition of users, by itself: duplicates, k-core, histories and lists.

Each function is an ordinary one that `stages/prepare.py` places on Ray, once per partition. Partitions hold whole users
and ranges of user keys, so that user ids, which count users in key order, are ranges too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpo4rec_ray.config.data import DataSection
from dpo4rec_ray.core.candidates import (
    SPLITS,
    Events,
    Ragged,
    fill_lists,
    first_segment_sizes,
    histories_before,
    knowledge_cut,
    plan_lists,
    ragged,
)
from dpo4rec_ray.core.kcore import ItemCounts, contains, count_items, keep_core_users
from dpo4rec_ray.core.keys import Keys, mix, stream
from dpo4rec_ray.prepare.partition_files import (
    Alive,
    block_files,
    read_alive,
    read_batch,
    read_core,
    user_names,
    write_arrow,
    write_names,
)
from dpo4rec_ray.store.artifacts import write_part

DAY_S = 86400
NUM_BINS = 100_000  # of the histogram of times from which the cuts in time are read
_NUMBERS = {
    "user_key": np.uint64,
    "item_key": np.uint64,
    "order": np.int64,
    "rating": np.float32,
    "timestamp_s": np.int64,
}


@dataclass(frozen=True)
class Counted:
    """What the driver must know of a partition."""

    items: ItemCounts
    num_events: int
    num_users: int
    num_collected: int = 0  # events before any was left out
    num_duplicates: int = 0
    splits: frozenset[str | None] = frozenset()  # named by logged lists; None: some name none


def collect(work: Path, partition: int, num_blocks: int, protocol: str, user_core: int) -> Counted:
    """Gather a partition's events, without duplicates and in the order of the protocol, and begin its k-core.

    Of several events of one user and item the earliest stays: by time, then by place in the file.
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
    num_duplicates = len(user_key) - len(kept)
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
    return _keep(work, partition, state, num_collected=len(user_key), num_duplicates=num_duplicates)


def peel(work: Path, partition: int, dead_items: Keys, user_core: int) -> Counted:
    """One round of the k-core: the events of dead items go, then users that have too few left.

    Run twice on the same partition it changes nothing more, so a task may be retried.
    """
    alive = read_alive(work, partition)
    stays = keep_core_users(alive.user, ~contains(dead_items, alive.item_key), user_core)
    state = Alive(alive.place[stays], alive.user[stays], alive.item_key[stays])
    return _keep(work, partition, state)


def time_range(work: Path, partition: int) -> tuple[int, int]:
    """Earliest and latest time of the living events; (0, -1) without any."""
    times = read_core(work, partition, ("timestamp_s",))["timestamp_s"]
    return (int(times.min()), int(times.max())) if len(times) else (0, -1)


def time_histogram(work: Path, partition: int, low: int, width: int) -> NDArray[np.int64]:
    """Living events per bin of `width` seconds from `low` on, [NUM_BINS]."""
    times = read_core(work, partition, ("timestamp_s",))["timestamp_s"]
    return np.bincount((times - low) // width, minlength=NUM_BINS)[:NUM_BINS]


@dataclass(frozen=True)
class UserBlock:
    """What the driver drew for a partition's users, in key order; [U] each."""

    first_id: int
    split: NDArray[np.str_]
    fold: NDArray[np.int32]
    profile: pa.Array


@dataclass(frozen=True)
class Built:
    """What a partition wrote."""

    num_events: int  # of the users taken
    num_positive_events: int
    num_lists: int
    num_positives: int  # candidates with a label above 0
    num_candidates: int
    histograms: dict[str, Counter[int]]  # length -> users or lists
    splits: Counter[str]  # split of users and of lists: "users/train", "lists/train", ...


def build(
    work: Path,
    partition: int,
    users: UserBlock,
    item_keys: Keys,
    data: DataSection,
    cuts_s: tuple[int, int] | None,
    seed: int,
    folders: dict[str, Path],
) -> Built:
    """Write the partition's users and lists.

    item_keys: the catalogue's keys in item id order (ascending). cuts_s: where validation and test time begin, with
    protocol "time". users: the first users.split.size users of the partition are wanted.
    """
    columns = read_core(work, partition, ("user_key", "item_key", "rating", "timestamp_s"))
    user_keys, bounds = key_bounds(columns["user_key"])
    num_users = len(users.split)
    user_keys, bounds = user_keys[:num_users], bounds[: num_users + 1]
    columns = {name: values[: bounds[-1]] for name, values in columns.items()}
    events = Events(
        bounds, np.searchsorted(item_keys, columns["item_key"]), columns["rating"], columns["timestamp_s"]
    )
    segment = np.searchsorted(np.array(cuts_s), events.timestamps_s, side="right") if cuts_s else None
    sizes = np.diff(bounds) if segment is None else first_segment_sizes(bounds, segment)
    history_sizes = knowledge_cut(sizes, data.max_history)
    plan = plan_lists(bounds, history_sizes, data.block_size, segment)
    keys = stream(mix(user_keys ^ np.uint64(seed))[plan.user], plan.number)
    ids, labels = fill_lists(
        events,
        plan,
        keys,
        num_items=len(item_keys),
        num_candidates=data.num_candidates,
        positive_rating=data.positive_rating,
        avoid_seen=data.protocol == "time",
    )
    list_split = users.split[plan.user] if segment is None else np.array(SPLITS)[segment[plan.start]]
    candidates = Ragged(np.arange(len(ids) + 1) * ids.shape[1], ids.ravel())
    return write_users_and_lists(
        partition,
        users,
        names=user_names(work, partition, user_keys),
        history=pick(events, ragged(bounds[:-1], history_sizes)),
        list_user=plan.user,
        list_number=plan.number,
        list_split=list_split,
        timestamp_s=pa.array(events.timestamps_s[plan.start]),
        list_history=pick(events, histories_before(bounds, plan.user, plan.start, data.reranker_history)),
        candidates=list_array(candidates.offsets, candidates.places),
        labels=list_array(candidates.offsets, labels.ravel()),
        num_events=int(bounds[-1]),
        num_positive_events=int(np.sum(events.ratings >= data.positive_rating)),
        folders=folders,
    )


def write_users_and_lists(
    partition: int,
    users: UserBlock,
    *,
    names: pa.Array,
    history: tuple[pa.ListArray, pa.ListArray],
    list_user: NDArray[np.int64],
    list_number: NDArray[np.int64],
    list_split: NDArray[np.str_],
    timestamp_s: pa.Array,
    list_history: tuple[pa.ListArray, pa.ListArray],
    candidates: pa.ListArray,
    labels: pa.ListArray,
    num_events: int,
    num_positive_events: int,
    folders: dict[str, Path],
) -> Built:
    """Write both artifacts' parts; decide each user's split from its lists.

    `history` and `list_history` are item ids and ratings, one entry per user and per list; `list_user` [M] counts the
    partition's users, `list_number` [M] each user's lists.
    """
    user_ids = users.first_id + np.arange(len(names))
    split = user_splits(users.split, list_user, list_split)
    user_table = pa.table(
        {
            "user_id": user_ids,
            "raw_id": names,
            "profile": users.profile,
            "split": pa.array(split),
            "fold": users.fold,
            "history_item_ids": history[0],
            "history_ratings": history[1],
        }
    )
    list_table = pa.table(
        {
            # Room for a million lists per user: unique without counting the lists of other partitions first.
            "list_id": (user_ids[list_user] << 20) + list_number,
            "user_id": user_ids[list_user],
            "split": pa.array(list_split),
            "timestamp_s": timestamp_s,
            "history_item_ids": list_history[0],
            "history_ratings": list_history[1],
            "candidate_item_ids": candidates,
            "labels": labels,
        }
    )
    write_part(folders["users"], "users", user_table, partition)
    write_part(folders["lists"], "lists", list_table, partition)
    lengths = {
        "history_length": history[0].value_lengths(),
        "lists_per_user": pa.array(np.bincount(list_user, minlength=len(names))),
        "list_length": candidates.value_lengths(),
        "list_history_length": list_history[0].value_lengths(),
    }
    splits = Counter(f"users/{name}" for name in split.tolist())
    splits.update(f"lists/{name}" for name in list_split.tolist())
    return Built(
        num_events=num_events,
        num_positive_events=num_positive_events,
        num_lists=len(list_table),
        num_positives=int(np.sum(labels.flatten().to_numpy() > 0)),
        num_candidates=len(candidates.flatten()),
        histograms={name: Counter(values.to_pylist()) for name, values in lengths.items()},
        splits=splits,
    )


def user_splits(
    drawn: NDArray[np.str_], list_user: NDArray[np.int64], list_split: NDArray[np.str_]
) -> NDArray[np.str_]:
    """Where each user counts for DPO and held-out rewards, [U].

    A user without training lists is never trained on. One with training and validation lists (a split by time) is a
    validation user if `drawn` says so, else a training user; one without any list stays as drawn.
    """
    has = {name: np.bincount(list_user[list_split == name], minlength=len(drawn)) > 0 for name in SPLITS}
    held_out = has["valid"] & (~has["train"] | (drawn == "valid"))
    split = np.where(has["train"], "train", "test")
    split = np.where(held_out, "valid", split)
    none = ~(has["train"] | has["valid"] | has["test"])
    return np.where(none, drawn, split)


def _keep(
    work: Path, partition: int, alive: Alive, *, num_collected: int = 0, num_duplicates: int = 0
) -> Counted:
    """Write down which events are alive, and count them. (In the object store the states would push each other out.)"""
    columns = {"place": alive.place, "user": alive.user, "item_key": alive.item_key}
    write_arrow(work / "alive" / f"{partition}.arrow", columns)
    num_users = 1 + int(np.count_nonzero(np.diff(alive.user))) if len(alive.user) else 0
    items = count_items(alive.item_key)
    return Counted(items, len(alive.place), num_users, num_collected, num_duplicates)


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
    several = np.flatnonzero(contains(repeated, pair))  # few: only these are put in order
    several = several[np.lexsort((order[several], times[several], pair[several]))]
    later = several[1:][pair[several[1:]] == pair[several[:-1]]]
    return np.setdiff1d(np.arange(len(pair)), later, assume_unique=True)


def key_bounds(user_key: Keys) -> tuple[Keys, NDArray[np.int64]]:
    """Distinct keys of sorted ones, and where each begins; the end of the last is appended."""
    keys, first = np.unique(user_key, return_index=True)
    return keys, np.append(first, len(user_key)).astype(np.int64)


def pick(events: Events, chosen: Ragged) -> tuple[pa.ListArray, pa.ListArray]:
    """Item ids and ratings at the chosen places, as list columns."""
    return (
        list_array(chosen.offsets, events.item_ids[chosen.places]),
        list_array(chosen.offsets, events.ratings[chosen.places].astype(np.float32)),
    )


def list_array(offsets: NDArray[np.int64], values: NDArray[Any]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
