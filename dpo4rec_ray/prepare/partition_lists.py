"""The users and candidate lists of one partition: knowledge histories, drawn lists, and the parts of both artifacts.

Placed on Ray by the stage, once per partition. `logged_lists.py` does the same with lists that are not drawn.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo4rec_ray.config.data import DataSection
from dpo4rec_ray.core.candidates import (
    SPLITS,
    Events,
    ListPlan,
    Ragged,
    fill_lists,
    histories_before,
    knowledge_cut,
    plan_lists,
    ragged,
)
from dpo4rec_ray.core.keys import Keys, mix, stream
from dpo4rec_ray.core.time_windows import (
    FIRST_WINDOW,
    Refreshed,
    TimeCuts,
    first_segment_sizes,
    refreshed_users,
)
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.prepare.partition_files import read_core, user_names
from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store.artifacts import write_part

# A list's id is its user's, and then its number: unique without counting the lists of other partitions, and a user may have a
# million lists.
NUMBER_BITS = 20
MAX_LISTS = 1 << NUMBER_BITS
SINCE = "@"  # between a user's id and the window that the user's text was written for


@dataclass(frozen=True)
class UserBlock:
    """A partition's users in key order: their first id, and what the driver drew or read for each, [U]."""

    first_id: int
    split: NDArray[np.str_]
    fold: NDArray[np.int32]
    profile: pa.Array


@dataclass(frozen=True)
class Built:
    """What a partition wrote.

    Attributes:
        num_events: events of the users that were kept.
        num_positives: candidates with a label above 0.
        histograms: name -> {length: number of users or lists}.
        splits: users and lists per split: "users/train", "lists/train", ...
    """

    num_events: int
    num_positive_events: int
    num_lists: int
    num_positives: int
    num_candidates: int
    histograms: dict[str, Counter[int]]
    splits: Counter[str]


@dataclass(frozen=True)
class Drawn:
    """The events of a partition's users and their drawn lists.

    Attributes:
        names: raw ids [U].
        history_sizes: how many of each user's first events are the knowledge history, [U].
        segment: of each event (`TimeCuts.segments`), [n]; None unless the protocol is "time".
        ids, labels: candidates of each list, [M, L].
    """

    events: Events
    names: pa.Array
    history_sizes: NDArray[np.int64]
    segment: NDArray[np.int64] | None
    plan: ListPlan
    ids: NDArray[np.int64]
    labels: NDArray[np.float32]


def draw_lists(
    work: Place,
    partition: int,
    num_users: int,
    item_keys: Keys,
    data: DataSection,
    cuts: TimeCuts | None,
    seed: int,
) -> Drawn:
    """The lists of the first `num_users` users of the partition.

    Args:
        item_keys: the catalogue's keys in item id order, which is ascending.
        cuts: None unless the protocol is "time".
        seed: of the drawn lists.
    """
    columns = read_core(work, partition, ("user_key", "item_key", "rating", "timestamp_s"))
    user_keys, bounds = key_bounds(columns["user_key"])
    user_keys, bounds = user_keys[:num_users], bounds[: num_users + 1]
    columns = {name: values[: bounds[-1]] for name, values in columns.items()}
    events = Events(
        bounds, np.searchsorted(item_keys, columns["item_key"]), columns["rating"], columns["timestamp_s"]
    )
    segment = cuts.segments(events.timestamps_s) if cuts else None
    sizes = np.diff(bounds) if segment is None else first_segment_sizes(bounds, segment)
    history_sizes = knowledge_cut(sizes, data.max_history)
    plan = plan_lists(bounds, history_sizes, data.block_size, segment)
    if data.drift_windows:
        # A list's number decides what is drawn. With this one a list is the same, however many windows are known.
        plan = replace(plan, number=plan.start - bounds[plan.user])
    ids, labels = fill_lists(
        events,
        plan,
        stream(mix(user_keys ^ np.uint64(seed))[plan.user], plan.number),
        num_items=len(item_keys),
        num_candidates=data.num_candidates,
        positive_rating=data.positive_rating,
        avoid_seen=data.protocol == "time",
    )
    names = user_names(work, partition, user_keys)
    return Drawn(events, names, history_sizes, segment, plan, ids, labels)


def build_drawn(
    work: Place,
    partition: int,
    users: UserBlock,
    item_keys: Keys,
    data: DataSection,
    cuts: TimeCuts | None,
    seed: int,
    folders: dict[str, Place],
) -> Built:
    """Write the partition's users and lists.

    Args:
        users: the first users of the partition; the others are left out.
        item_keys, cuts, seed: of `draw_lists`.
    """
    drawn = draw_lists(work, partition, len(users.split), item_keys, data, cuts, seed)
    events, plan = drawn.events, drawn.plan
    list_split = (
        users.split[plan.user]
        if drawn.segment is None
        else np.array(SPLITS)[np.minimum(drawn.segment[plan.start], FIRST_WINDOW)]
    )
    return write_users_and_lists(
        partition,
        users,
        names=drawn.names,
        history=pick(events, ragged(events.bounds[:-1], drawn.history_sizes)),
        list_user=plan.user,
        list_split=list_split,
        num_events=int(events.bounds[-1]),
        num_positive_events=int(np.sum(events.ratings >= data.positive_rating)),
        folders=folders,
        **_lists(drawn, np.arange(len(plan.user)), data),
    )


def _lists(drawn: Drawn, chosen: NDArray[np.int64], data: DataSection) -> dict[str, Any]:
    """What `write_users_and_lists` takes of the chosen lists [M], whoever they are written for."""
    events, plan = drawn.events, drawn.plan
    user, start = plan.user[chosen], plan.start[chosen]
    candidates = Ragged(np.arange(len(chosen) + 1) * drawn.ids.shape[1], drawn.ids[chosen].ravel())
    return {
        "list_number": plan.number[chosen],
        "timestamp_s": pa.array(events.timestamps_s[start]),
        "list_history": pick(events, histories_before(events.bounds, user, start, data.reranker_history)),
        "candidates": list_array(candidates.offsets, candidates.places),
        "labels": list_array(candidates.offsets, drawn.labels[chosen].ravel()),
    }


def find_refreshed(work: Place, partition: int, num_users: int, cuts: TimeCuts) -> Refreshed:
    """`refreshed_users` of the partition's first users, for the windows of test time."""
    columns = read_core(work, partition, ("user_key", "timestamp_s"))
    _, bounds = key_bounds(columns["user_key"])
    bounds = bounds[: num_users + 1]
    return refreshed_users(bounds, cuts.segments(columns["timestamp_s"][: bounds[-1]]))


def build_refreshed(
    work: Place,
    partition: int,
    part: int,
    num_users: int,
    users: UserBlock,
    found: Refreshed,
    item_keys: Keys,
    data: DataSection,
    cuts: TimeCuts,
    seed: int,
    folders: dict[str, Place],
) -> Built:
    """Write a part more of users and lists: every user once for each window, ID@WINDOW, with the last events before the window as
    history and the test lists from that window on.

    Args:
        part: number of the part.
        users, found: the users to write, and what `find_refreshed` said of them.
    """
    drawn = draw_lists(work, partition, num_users, item_keys, data, cuts, seed)
    events, (owner, window, before) = drawn.events, found
    sizes = np.minimum(before, data.max_history)
    # Lists are in the order of users and events, and none spans two windows: those from a window on end with the user's.
    first = np.searchsorted(drawn.plan.start, events.bounds[:-1][owner] + before)
    lists = ragged(first, np.searchsorted(drawn.plan.user, owner, side="right") - first)
    names = pc.binary_join_element_wise(
        drawn.names.take(pa.array(owner)),
        pa.array((window - FIRST_WINDOW + cuts.known).astype(str)),
        SINCE,
    )
    return write_users_and_lists(
        part,
        users,
        names=names,
        history=pick(events, ragged(events.bounds[:-1][owner] + before - sizes, sizes)),
        list_user=np.repeat(np.arange(len(owner)), np.diff(lists.offsets)),
        list_split=np.full(len(lists.places), "test"),
        num_events=0,  # they are counted with the users themselves
        num_positive_events=0,
        folders=folders,
        **_lists(drawn, lists.places, data),
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
    folders: dict[str, Place],
) -> Built:
    """Write the partition's parts of both artifacts; decide each user's split from its lists.

    Args:
        history, list_history: item ids and ratings, one entry per user and per list.
        list_user: [M] the user's place in the partition. list_number: [M] of ListPlan.

    Raises:
        UserError: a user has more lists than their ids can tell apart.
    """
    _check_numbers(names, list_user, list_number)
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
            "list_id": (user_ids[list_user] << NUMBER_BITS) + list_number,
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


def _check_numbers(names: pa.Array, list_user: NDArray[np.int64], list_number: NDArray[np.int64]) -> None:
    if not len(list_number) or list_number.max() < MAX_LISTS:
        return
    user = list_user[np.argmax(list_number)]
    raise UserError(
        f"the interactions or logged lists: user {names[int(user)].as_py()!r} has {np.sum(list_user == user):,} candidate lists, "
        f"numbered up to {list_number.max():,}; their ids tell {MAX_LISTS:,} lists of a user apart. Nobody does so much: leave "
        "this guest or bot user out of the files"
    )


def user_splits(
    drawn: NDArray[np.str_], list_user: NDArray[np.int64], list_split: NDArray[np.str_]
) -> NDArray[np.str_]:
    """The split of each user, which decides about DPO and held-out rewards, [U].

    A user without training lists is never trained on. A user with both training and validation lists (a split by time)
    is a validation user if `drawn` says so, else a training user. A user without lists keeps the drawn split.
    """
    has = {name: np.bincount(list_user[list_split == name], minlength=len(drawn)) > 0 for name in SPLITS}
    held_out = has["valid"] & (~has["train"] | (drawn == "valid"))
    split = np.where(has["train"], "train", "test")
    split = np.where(held_out, "valid", split)
    none = ~(has["train"] | has["valid"] | has["test"])
    return np.where(none, drawn, split)


def list_number(list_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of each list within its user."""
    return list_ids & (MAX_LISTS - 1)


def key_bounds(user_key: Keys) -> tuple[Keys, NDArray[np.int64]]:
    """The distinct keys [U] of sorted keys, and where each begins, with the end of the last, [U + 1]."""
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
