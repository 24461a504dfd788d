"""The files that `prepare` writes and reads while it works: one Arrow file per block or partition.

events/BLOCK  lists/BLOCK     written by `ingest`: record batch p holds the users of partition p
core/P  alive/P               a partition's events in order; the places of those that are still in the k-core
names/users-P  names/items-P  keys and raw ids, in key order
logged/P                      a partition's logged lists in order
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpo4rec_ray.core.joins import NUM_COMPARED
from dpo4rec_ray.core.kcore import contains
from dpo4rec_ray.core.keys import Keys
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.storage.parquet import opened
from dpo4rec_ray.storage.places import Place, new_file


@dataclass(frozen=True)
class Alive:
    """The n events of a partition that are still in the k-core.

    Attributes:
        place: [n] rows of the file core/P.
        user: [n] numbers within the partition, ascending.
        item_key: [n].
    """

    place: NDArray[np.int32]
    user: NDArray[np.int32]
    item_key: Keys


@contextlib.contextmanager
def new_arrow(target: Place, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    """An Arrow file that gets its name when it is complete: a task that Ray retries never reads half a file."""
    with (
        new_file(target) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        yield writer


def read_batch(file: Place, partition: int, names: tuple[str, ...]) -> pa.RecordBatch:
    """Some columns of one partition's batch."""
    with opened(file) as handle:
        schema = pa.ipc.open_file(handle).schema
        fields = [schema.get_field_index(name) for name in names]
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        return pa.ipc.open_file(handle, options=options).get_batch(partition)


def write_arrow(file: Place, columns: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    table = pa.table(columns)
    with new_arrow(file, table.schema) as writer:
        writer.write_table(table)


def read_arrow(file: Place) -> pa.Table:
    with opened(file) as handle:
        return pa.ipc.open_file(handle).read_all()


def block_files(folder: Place, num_blocks: int) -> list[Place]:
    """The files that `ingest` wrote, in file order.

    Raises:
        UserError: this node does not see all of them.
    """
    found = sorted(folder.glob("*.arrow"))
    if len(found) != num_blocks:
        raise UserError(
            f"{folder}: this node sees {len(found)} of {num_blocks} files; set run.root to a folder that every node sees"
        )
    return found


def read_alive(work: Place, partition: int) -> Alive:
    table = read_arrow(work / "alive" / f"{partition}.arrow")
    return Alive(*(table[name].to_numpy() for name in ("place", "user", "item_key")))


def read_core(work: Place, partition: int, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Columns of the partition's events that are still in the k-core, in order."""
    table = read_arrow(work / "core" / f"{partition}.arrow")
    place = read_alive(work, partition).place
    return {name: table[name].to_numpy()[place] for name in names}


def read_names(work: Place, partition: int, kind: str) -> pa.Table:
    """key, raw_id of the partition's users or items, in key order."""
    return read_arrow(work / "names" / f"{kind}s-{partition}.arrow")


def write_names(
    work: Place,
    partition: int,
    sources: list[Place],
    lengths: list[int],
    chosen: NDArray[np.int64],
    user_key: Keys,
    item_key: Keys,
) -> None:
    """Write the raw ids of the users and items of the chosen events. One row per id is read, one block after the other."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for column, keys in (("user", user_key), ("item", item_key)):
        distinct, first = np.unique(keys, return_index=True)
        rows = chosen[first]
        by_row = np.argsort(rows)
        bounds = np.searchsorted(rows[by_row], starts)
        texts = [
            read_batch(file, partition, (column,))[column].take(pa.array(rows[by_row[low:high]] - start))
            for file, start, low, high in zip(sources, starts, bounds[:-1], bounds[1:], strict=False)
            if high > low
        ]
        found = pa.concat_arrays(texts) if texts else pa.array([], pa.string())
        in_key_order = np.empty(len(rows), dtype=np.int64)
        in_key_order[by_row] = np.arange(len(rows))
        write_arrow(
            work / "names" / f"{column}s-{partition}.arrow",
            {"key": distinct, "raw_id": found.take(pa.array(in_key_order))},
        )


def user_keys_of(work: Place, partition: int, num_users: int) -> Keys:
    """Keys of the partition's first `num_users` users, in key order."""
    return np.unique(read_core(work, partition, ("user_key",))["user_key"])[:num_users]


def item_names(work: Place, partition: int, item_keys: Keys) -> tuple[Keys, pa.Array]:
    """Keys and raw ids of those items of the partition that are in the catalogue."""
    table = read_names(work, partition, "item")
    table = table.filter(pa.array(contains(item_keys, table["key"].to_numpy())))
    return table["key"].to_numpy(), table["raw_id"].combine_chunks()


def some_ids(work: Place, kind: str) -> list[str]:
    """Raw ids of "user" or "item", of the first partition that has any."""
    for file in sorted((work / "names").glob(f"{kind}s-*.arrow")):
        if ids := read_arrow(file)["raw_id"].slice(0, NUM_COMPARED).to_pylist():
            return ids
    return []


def user_names(work: Place, partition: int, user_keys: Keys) -> pa.Array:
    """Raw ids of some of the partition's users, by their sorted keys."""
    table = read_names(work, partition, "user")
    places = np.searchsorted(table["key"].to_numpy(), user_keys)
    return table["raw_id"].combine_chunks().take(pa.array(places))
