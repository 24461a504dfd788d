"""Users by id range, a shard at a time, which of them a turn samples, and what they like in lists.

Imports no torch: the actors that write texts need none, and it costs each 1.3 s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.turn_users import TurnUsers
from dpo4rec_ray.storage.parquet import parquet_file, parquet_metadata
from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.schemas import SCHEMAS

# User ids [n], and which of them are validation users, bool [n] -> which take part, bool [n].
TakesPart = Callable[[np.ndarray, np.ndarray], np.ndarray]

# With more users, what is pooled over users is taken from the users of some parts: more would only cost the driver memory.
POOLED_USERS = 100_000


def turn_users(config: Config, turn: int) -> TurnUsers:
    """Which users a turn of the recipe samples."""
    run = config.run
    return TurnUsers(
        run.seed,
        config.generate.user_frac,
        turn - run.first_turn(turn),
        run.turns_per_round,
        run.watched_users,
    )


def pooled_parts(files: Sequence[Place], num_users: int) -> Sequence[Place]:
    """All of an artifact's parts, or of more than POOLED_USERS users every k-th part, with at most about so many users."""
    return files[:: max(1, -(-num_users // POOLED_USERS))]


def valid_users(store: RunDir) -> np.ndarray:
    """Ids of the validation users."""
    return store.read("users", split="valid", columns=["user_id"])["user_id"].to_numpy()


def held_out(users: pa.Table) -> np.ndarray:
    """Which rows of `users` are validation users, bool [n]."""
    return pc.equal(users["split"], "valid").to_numpy()


class UserRows:
    """Rows of `users` by id range. Finds once which ids each row group has, then decodes only the row groups of a range."""

    def __init__(self, store: RunDir, splits: tuple[str, ...]):
        self._splits = pa.array(splits)
        self._groups: list[tuple[int, int, Place, int]] = []  # lowest and highest user id, file, row group
        for file in store.files("users"):
            footer = parquet_metadata(file)
            column = footer.schema.to_arrow_schema().get_field_index("user_id")
            for group in range(footer.num_row_groups):
                limits = footer.row_group(group).column(column).statistics
                if limits is not None and limits.has_min_max:
                    self._groups.append((limits.min, limits.max, file, group))

    def read(self, low: int, high: int) -> pa.Table:
        """Users with low <= user_id < high of the splits, in id order."""
        found = [SCHEMAS["users"].empty_table()]
        for first, last, file, group in self._groups:
            if first < high and last >= low:
                with parquet_file(file) as parquet:
                    table = parquet.read_row_group(group)
                ids = table["user_id"]
                inside = pc.and_(pc.greater_equal(ids, low), pc.less(ids, high))
                found.append(table.filter(pc.and_(inside, pc.is_in(table["split"], self._splits))))
        return pa.concat_tables(found).sort_by("user_id")


def liked_items(lists: pa.Table) -> dict[int, list[int]]:
    """The items that each user likes in these rows of `lists`, in their order, an item as often as it is liked.

    lists: columns user_id, candidate_item_ids and labels. Users without a list are left out.
    """
    liked: dict[int, list[int]] = {}
    for row in lists.to_pylist():
        shown = zip(row["candidate_item_ids"], row["labels"], strict=True)
        liked.setdefault(row["user_id"], []).extend(item for item, label in shown if label > 0)
    return liked


def users_per_shard(
    store: RunDir,
    splits: tuple[str, ...],
    shard_size: int,
    takes_part: TakesPart | None = None,
) -> np.ndarray:
    """How many users of the splits each shard of `shard_size` user ids has: int64 [shards]. Reads batch by batch.

    takes_part: which ones count; None: all.
    """
    counts = np.zeros(-(-store.require("users").rows // shard_size), np.int64)
    for file in store.files("users"):
        with parquet_file(file) as parquet:
            for batch in parquet.iter_batches(columns=["user_id", "split"]):
                table = pa.Table.from_batches([batch])
                table = table.filter(pc.is_in(table["split"], pa.array(splits)))
                ids = table["user_id"].to_numpy()
                if takes_part is not None:
                    ids = ids[takes_part(ids, held_out(table))]
                counts += np.bincount(ids // shard_size, minlength=len(counts))
    return counts
