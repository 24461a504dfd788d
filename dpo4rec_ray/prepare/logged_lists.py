"""Logged candidate lists in place of drawn ones: impressions of a first-stage ranker with labels (beyond the paper).

The dataset's events give the histories. Where the lists and the user's events have times, a user's history is every event
before the first list. Otherwise it ends before the first event whose item is a positive of a list, and leaves out every
item that is in one of the user's lists. So the history shows nothing of a list.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo4rec_ray.config.data import DataSection
from dpo4rec_ray.core.candidates import Events, Ragged, ragged
from dpo4rec_ray.core.joins import NUM_COMPARED, JoinSide, check_join
from dpo4rec_ray.core.kcore import contains, count_items
from dpo4rec_ray.core.keys import Keys, keys_of
from dpo4rec_ray.prepare.partition_events import DAY_S, Counted
from dpo4rec_ray.prepare.partition_files import (
    block_files,
    read_alive,
    read_arrow,
    read_batch,
    read_core,
    read_names,
    user_names,
    write_arrow,
)
from dpo4rec_ray.prepare.partition_lists import Built, UserBlock, key_bounds, pick, write_users_and_lists
from dpo4rec_ray.storage.places import Place

_COLUMNS = (
    "user_key", "order", "user", "timestamp_s", "split", "candidates", "labels", "history", "history_ratings",
)  # fmt: skip


def collect_lists(work: Place, partition: int, num_blocks: int) -> Counted:
    """Sort a partition's lists by user and time, and add the raw ids in them to the users' and items'.

    Returns:
        The number of users with lists, and the counts of items in lists.
    """
    parts = [read_batch(file, partition, _COLUMNS) for file in block_files(work / "lists", num_blocks)]
    table = pa.Table.from_batches(parts).sort_by(
        [("user_key", "ascending"), ("timestamp_s", "ascending"), ("order", "ascending")]
    )
    write_arrow(
        work / "logged" / f"{partition}.arrow", {name: table[name].combine_chunks() for name in _COLUMNS}
    )
    named = pa.chunked_array(
        [column.combine_chunks().flatten() for column in (table["candidates"], table["history"])]
    )
    _add_names(work, partition, "user", table["user"])
    _add_names(work, partition, "item", named)
    users = np.unique(table["user_key"].to_numpy())
    event_users = np.unique(read_core(work, partition, ("user_key",))["user_key"])
    return Counted(
        count_items(keys_of(named)),
        num_events=len(read_alive(work, partition).place),
        num_users=len(users),
        num_known_users=int(np.sum(contains(event_users, users))),
        splits=frozenset(pc.unique(table["split"]).to_pylist()),
    )


@dataclass(frozen=True)
class EventIds:
    """What the events are of, before the ids in lists are added: all keys of items, and some raw ids."""

    item_keys: Keys
    num_users: int
    some_users: list[str]
    some_items: list[str]


def check_lists(
    work: Place, events: EventIds, item_keys: Keys, counts: list[Counted], described: pa.Table | None
) -> None:
    """item_keys: of the items in lists. counts: of `collect_lists`. described: the items that the items' files describe.

    Raises:
        UserError: almost no user or item of the lists is among those of the events or the items' files.
    """

    def listed(name: str) -> list[str]:
        for file in sorted((work / "logged").glob("*.arrow")):
            column = read_arrow(file)[name].slice(0, NUM_COMPARED)
            column = column.combine_chunks().flatten() if name == "candidates" else column
            if ids := pc.unique(column).slice(0, NUM_COMPARED).to_pylist():
                return ids
        return []

    num_users = sum(one.num_users for one in counts)
    check_join(
        "user",
        sum(one.num_known_users for one in counts),
        JoinSide("the interactions", events.num_users, lambda: events.some_users),
        JoinSide("logged.file", num_users, lambda: listed("user")),
    )
    known = contains(events.item_keys, item_keys)
    if described is not None:
        known |= contains(np.unique(described["key"].to_numpy()), item_keys)
    check_join(
        "item",
        int(np.sum(known)),
        JoinSide("the interactions", len(events.item_keys), lambda: events.some_items),
        JoinSide("logged.file", len(item_keys), lambda: listed("candidates")),
    )


def logged_user_keys(work: Place, partition: int, num_users: int) -> Keys:
    """Keys of the partition's first `num_users` users with lists, in key order."""
    return np.unique(read_arrow(work / "logged" / f"{partition}.arrow")["user_key"].to_numpy())[:num_users]


def build_logged(
    work: Place,
    partition: int,
    users: UserBlock,
    item_keys: Keys,
    data: DataSection,
    draw_valid: bool,
    folders: dict[str, Place],
) -> Built:
    """Write the partition's users and its logged lists.

    draw_valid: no list names the validation split: the training lists of the users drawn for validation move to it.
    """
    table = read_arrow(work / "logged" / f"{partition}.arrow")
    user_keys, bounds = key_bounds(table["user_key"].to_numpy())
    num_users = len(users.split)
    user_keys, bounds = user_keys[:num_users], bounds[: num_users + 1]
    table = table.slice(0, bounds[-1]).combine_chunks()
    user = np.repeat(np.arange(num_users), np.diff(bounds))
    candidates = item_ids_of(item_keys, table["candidates"].combine_chunks())
    labels = table["labels"].combine_chunks()
    events = _events_of(work, partition, user_keys, item_keys)
    time_s = pc.fill_null(table["timestamp_s"], -1).to_numpy()
    shown = np.flatnonzero(
        _before_lists(events, user, time_s, candidates, labels, len(item_keys), data.protocol)
    )
    ends = np.searchsorted(shown, events.bounds[1:])
    sizes = np.minimum(ends - np.searchsorted(shown, events.bounds[:-1]), data.max_history)
    histories = ragged(ends - sizes, sizes)
    histories = Ragged(histories.offsets, shown[histories.places])
    lengths = np.minimum(sizes, data.reranker_history)[user]
    untimed = ragged(histories.offsets[1:][user] - lengths, lengths)
    untimed = Ragged(untimed.offsets, histories.places[untimed.places])
    timed = _before_time(events, user, time_s, data.reranker_history, data.protocol)
    return write_users_and_lists(
        partition,
        users,
        names=user_names(work, partition, user_keys),
        history=pick(events, histories),
        list_user=user,
        list_number=np.arange(len(table)) - bounds[:-1][user],
        list_split=_splits(table["split"], users.split[user], draw_valid),
        timestamp_s=pa.array(np.maximum(time_s, 0)),
        list_history=_list_histories(
            table, _have_times(events)[user], pick(events, timed), pick(events, untimed), item_keys
        ),
        candidates=candidates,
        labels=labels,
        num_events=int(events.bounds[-1]),
        num_positive_events=int(np.sum(events.ratings >= data.positive_rating)),
        folders=folders,
    )


def item_ids_of(item_keys: Keys, lists: pa.ListArray) -> pa.ListArray:
    """Lists of raw ids as lists of item ids; a null list stays null."""
    ids = np.searchsorted(item_keys, keys_of(lists.flatten()))
    offsets = np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy())])
    nulls = lists.is_null() if lists.null_count else None
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(ids), mask=nulls)


def _events_of(work: Place, partition: int, user_keys: Keys, item_keys: Keys) -> Events:
    """The events of the users with lists; some users may have no event."""
    columns = read_core(work, partition, ("user_key", "item_key", "rating", "timestamp_s"))
    wanted = contains(user_keys, columns["user_key"])
    columns = {name: values[wanted] for name, values in columns.items()}
    bounds = np.append(np.searchsorted(columns["user_key"], user_keys), np.sum(wanted))
    items = np.searchsorted(item_keys, columns["item_key"])
    return Events(bounds.astype(np.int64), items, columns["rating"], columns["timestamp_s"])


def _before_lists(
    events: Events,
    user: NDArray[np.int64],
    time_s: NDArray[np.int64],
    candidates: pa.ListArray,
    labels: pa.ListArray,
    num_items: int,
    protocol: str,
) -> NDArray[np.bool_]:
    """Which events a user's prompt may show, [n].

    user, time_s: [M] of the lists; the time is -1 where it is unknown.
    """
    num_users, owner = len(events.bounds) - 1, events.user
    first_s = np.full(num_users, np.iinfo(np.int64).max)
    np.minimum.at(first_s, user, time_s)
    timed = (first_s >= 0) & _have_times(events)
    before = _time(events.timestamps_s, protocol) < _time(first_s, protocol)[owner]
    list_of = np.repeat(np.arange(len(user)), candidates.value_lengths().to_numpy())
    pair = user[list_of] * num_items + candidates.flatten().to_numpy()
    own = owner * num_items + events.item_ids
    positive = np.isin(own, pair[labels.flatten().to_numpy() > 0])
    first_positive = np.full(num_users, len(own))
    np.minimum.at(first_positive, owner[positive], np.flatnonzero(positive))
    apart = (np.arange(len(own)) < first_positive[owner]) & ~np.isin(own, pair)
    return np.where(timed[owner], before, apart)


def _before_time(
    events: Events, user: NDArray[np.int64], time_s: NDArray[np.int64], length: int, protocol: str
) -> Ragged:
    """The last `length` events before each list's time."""
    # More than any time in seconds.
    scale = 2**33
    own = events.user * scale + _time(events.timestamps_s, protocol)
    ends = np.searchsorted(own, user * scale + np.maximum(_time(time_s, protocol), 0))
    sizes = np.minimum(ends - events.bounds[:-1][user], length)
    return ragged(ends - sizes, sizes)


def _time(times_s: NDArray[np.int64], protocol: str) -> NDArray[np.int64]:
    return times_s // DAY_S * DAY_S if protocol == "paper" else times_s


def _have_times(events: Events) -> NDArray[np.bool_]:
    """[users] whether any event has a time. (Without one it is 0, and before every list.)"""
    owner = events.user[events.timestamps_s > 0]
    return np.bincount(owner, minlength=len(events.bounds) - 1) > 0


def _list_histories(
    table: pa.Table,
    have_times: NDArray[np.bool_],
    timed: tuple[pa.ListArray, pa.ListArray],
    untimed: tuple[pa.ListArray, pa.ListArray],
    item_keys: Keys,
) -> tuple[pa.ListArray, pa.ListArray]:
    """Item ids and ratings before each list: as logged, else the events before its time, else the prompt's history.

    have_times: [M] whether the user's events have times. A logged history without ratings gets rating 0, which means unknown.
    """
    has_time = pc.and_(table["timestamp_s"].is_valid().combine_chunks(), pa.array(have_times))
    ids, ratings = (pc.if_else(has_time, one, other) for one, other in zip(timed, untimed, strict=True))
    logged = table["history"].combine_chunks()
    given = item_ids_of(item_keys, logged)
    zeros = pa.ListArray.from_arrays(given.offsets, pa.array(np.zeros(len(given.values), np.float32)))
    stars = table["history_ratings"].combine_chunks()
    stars = pc.if_else(stars.is_valid(), stars, zeros)
    return pc.if_else(given.is_valid(), given, ids), pc.if_else(given.is_valid(), stars, ratings)


def _splits(logged: pa.ChunkedArray, drawn: NDArray[np.str_], draw_valid: bool) -> NDArray[np.str_]:
    split = pc.fill_null(logged, "").to_numpy(zero_copy_only=False).astype(str)
    split = np.where(split == "", drawn, split)
    return np.where((split == "train") & (drawn == "valid"), "valid", split) if draw_valid else split


def _add_names(work: Place, partition: int, kind: str, found: pa.ChunkedArray) -> None:
    """Add the raw ids in the lists to those of the events."""
    before = read_names(work, partition, kind)
    fresh = pc.unique(found)
    keys = np.concatenate([before["key"].to_numpy(), keys_of(fresh)])
    raw_ids = pa.concat_arrays([before["raw_id"].combine_chunks(), fresh])
    distinct, first = np.unique(keys, return_index=True)
    write_arrow(
        work / "names" / f"{kind}s-{partition}.arrow",
        {"key": distinct, "raw_id": raw_ids.take(pa.array(first))},
    )
