"""Items and users in the order of their keys: the catalogue, profiles, splits and known tastes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.placed import Placed
from dpo4rec_ray.core.candidates import split_users
from dpo4rec_ray.core.joins import NUM_COMPARED, JoinSide, check_join
from dpo4rec_ray.core.kcore import contains
from dpo4rec_ray.core.keys import Keys, keys_of, seed_of
from dpo4rec_ray.datasets.files import without_query
from dpo4rec_ray.datasets.source import ITEMS, USERS, Source
from dpo4rec_ray.prepare.data_report import DataReport, Untitled
from dpo4rec_ray.prepare.ingest import read_rows
from dpo4rec_ray.prepare.partition_lists import UserBlock

# Rows of a column that are cast at a time: their text is far below 2 GiB, which is all that an Arrow string array can hold.
CAST_ROWS = 2**20


@dataclass(frozen=True)
class Wanted:
    """Sorted keys that are asked for, and some of the raw ids that they stand for."""

    keys: Keys
    some_ids: Callable[[], list[str]]


def rows_about(
    kind: str, source: Source, wanted: Wanted | None, report: DataReport, where: Placed
) -> pa.Table | None:
    """What the files of "items" or "users" hold, with a column `key`; None where the source has no such files.

    wanted: rows with another key are left out. None: all rows are kept. where: what the nodes of those who read must have.

    Raises:
        UserError: too many rows are damaged, or almost none is wanted.
    """
    files = source.items if kind == "items" else source.users
    if not files:
        return None
    schema = ITEMS if kind == "items" else USERS
    table, counts = read_rows(files, schema, wanted.keys if wanted else None, where)
    report.add(kind, counts)
    if wanted:
        num_matched = len(np.unique(table["key"].to_numpy()))
        check_join(
            kind.removesuffix("s"),
            num_matched,
            JoinSide("the interactions", len(wanted.keys), wanted.some_ids),
            JoinSide(
                PurePosixPath(without_query(files[0].path)).name,
                counts.rows_read,
                lambda: counts.unwanted_ids,
            ),
        )
    return table


def catalogue_table(
    item_keys: Keys, names: tuple[Keys, pa.Array], rows: pa.Table | None
) -> tuple[pa.Table, Untitled]:
    """The catalogue in item id order, which is the order of keys, and which items have no title.

    names: keys and raw ids of the items; rows: of `rows_about`.
    """
    raw_ids = aligned(item_keys, *names)
    rows = ITEMS.empty_table().append_column("key", pa.array([], pa.uint64())) if rows is None else rows
    titles, attributes = (
        aligned(item_keys, rows["key"].to_numpy(), _whole(rows[name], kind))
        for name, kind in (("title", pa.large_string()), ("attributes", pa.list_(pa.large_string())))
    )
    untitled = pc.equal(pc.fill_null(pc.binary_length(titles), 0), 0)
    # A prompt must not be empty: an item without a title is shown by its id.
    titles = pc.if_else(untitled, untitled_names(raw_ids).cast(titles.type), titles)
    offsets = np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(attributes), 0).to_numpy())])
    table = pa.table(
        {
            "item_id": np.arange(len(item_keys)),
            "raw_id": raw_ids,
            "title": _in_chunks(titles, pa.string()),
            "attributes": _in_chunks(
                pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), attributes.flatten()),
                pa.list_(pa.string()),
            ),
        }
    )
    absent = untitled.to_numpy(zero_copy_only=False) & ~contains(np.unique(rows["key"].to_numpy()), item_keys)
    some_absent = raw_ids.take(pa.array(np.flatnonzero(absent)[:NUM_COMPARED])).to_pylist()
    return table, Untitled(pc.sum(untitled).as_py() or 0, int(absent.sum()), some_absent)


def untitled_names(raw_ids: pa.Array) -> pa.Array:
    """What items without a title are called."""
    return pc.binary_join_element_wise("item", raw_ids, " ")


def new_names(item_keys: Keys, found: Iterable[tuple[int, tuple[Keys, pa.Array]]]) -> tuple[Keys, pa.Array]:
    """Keys and raw ids of all partitions, each item once. (Most partitions have the popular items.)"""
    known = np.zeros(len(item_keys), dtype=np.bool_)
    keys, raw_ids = [np.zeros(0, np.uint64)], [pa.array([], pa.string())]
    for _, (these, names) in found:
        place = np.searchsorted(item_keys, these)
        fresh = ~known[place]
        known[place] = True
        keys.append(these[fresh])
        raw_ids.append(names.filter(pa.array(fresh)))
    return np.concatenate(keys), pa.concat_arrays(raw_ids)


def user_blocks(
    config: Config, user_keys: Keys, sizes: np.ndarray, rows: pa.Table | None, test_frac: float
) -> tuple[list[UserBlock], int]:
    """Splits, folds and profiles of the users, cut into partitions of `sizes` users, and how many have no profile."""
    split, fold = split_users(
        np.arange(len(user_keys)),
        test_frac,
        config.data.valid_frac,
        config.reward.num_folds,
        seed_of(config.run.seed, "split"),
    )
    without_profile = 0
    if rows is None:
        profiles = pa.array([""]).take(pa.array(np.zeros(len(user_keys), dtype=np.int64)))
    else:
        profiles = aligned(user_keys, rows["key"].to_numpy(), _whole(rows["profile"], pa.large_string()))
        without_profile = profiles.null_count
        profiles = pc.fill_null(profiles, "")
    ends = np.cumsum(sizes)
    blocks = [
        UserBlock(int(low), split[low:high], fold[low:high], _copied(profiles, low, high).cast(pa.string()))
        for low, high in zip(ends - sizes, ends, strict=True)
    ]
    return blocks, without_profile


def refreshed_blocks(blocks: list[UserBlock], owners: list[np.ndarray]) -> list[UserBlock]:
    """Users that are written once more, per partition: their places in its block, [P]. Their ids follow those of all blocks."""
    first_id = sum(len(block.split) for block in blocks)
    found = []
    for block, owner in zip(blocks, owners, strict=True):
        profile = block.profile.take(pa.array(owner))
        found.append(UserBlock(first_id, block.split[owner], block.fold[owner], profile))
        first_id += len(owner)
    return found


def first_users(sizes: np.ndarray, max_users: int) -> np.ndarray:
    """How many users of each partition to keep: all, or the first `max_users` of all partitions.

    Users are in key order, and a key is a hash, so the first ones are a random sample.
    """
    if not max_users:
        return sizes
    before = np.cumsum(sizes) - sizes
    return np.clip(max_users - before, 0, sizes)


def truth_table(truth: pa.Table | None, user_keys: Keys) -> pa.Table:
    """What each user loves, in user id order; no rows where it is not known."""
    if truth is None:
        return pa.table({"user_id": pa.array([], pa.int64()), "tastes": pa.array([], pa.list_(pa.string()))})
    tastes = aligned(user_keys, keys_of(truth["raw_id"]), truth["tastes"].combine_chunks())
    return pa.table({"user_id": np.arange(len(user_keys)), "tastes": tastes})


def _whole(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    """The column as one array, of a type that holds more than 2 GiB of text."""
    return column.cast(kind).combine_chunks()


def _in_chunks(values: pa.Array, kind: pa.DataType) -> pa.ChunkedArray:
    """The opposite of `_whole`: chunks of a type whose arrays hold up to 2 GiB of text each."""
    starts = range(0, len(values), CAST_ROWS)
    return pa.chunked_array(
        [_copied(values, low, min(low + CAST_ROWS, len(values))).cast(kind) for low in starts], kind
    )


def _copied(values: pa.Array, low: int, high: int) -> pa.Array:
    """Values low to high, without the others: a slice is pickled, and cast, with the whole column."""
    return pa.concat_arrays([values.slice(low, high - low)])


def aligned(keys: Keys, found: Keys, values: pa.Array) -> pa.Array:
    """The values [m] of the found keys [m], in the order of `keys`, [n].

    Where a key is found several times the first value is taken; where it is not found the value is null.
    """
    if not len(found):
        return pa.nulls(len(keys), values.type)
    distinct, first = np.unique(found, return_index=True)
    place = np.minimum(np.searchsorted(distinct, keys), len(distinct) - 1)
    return values.take(pa.array(first[place], mask=distinct[place] != keys))
