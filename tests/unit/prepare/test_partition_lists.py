"""Ids of lists, which hold their user and number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.prepare.partition_lists import MAX_LISTS, UserBlock, list_array, write_users_and_lists
from dpo4rec_ray.storage.places import place
from dpo4rec_ray.store.artifacts import part_file


def write(folder: Path, last_number: int) -> None:
    """Two users; the second has two lists, the last with this number."""
    folders = {name: place(folder / name) for name in ("users", "lists")}
    for one in folders.values():
        one.mkdir(parents=True)
    users = UserBlock(5, np.array(["train"] * 2), np.zeros(2, np.int32), pa.array(["", ""]))

    def columns(rows: int) -> tuple[pa.ListArray, pa.ListArray]:
        offsets = np.arange(rows + 1)
        return list_array(offsets, np.arange(rows)), list_array(offsets, np.ones(rows, np.float32))

    candidates, labels = columns(3)
    lists: dict[str, Any] = {
        "list_user": np.array([0, 1, 1]),
        "list_number": np.array([0, 0, last_number]),
        "list_split": np.array(["train"] * 3),
    }
    write_users_and_lists(
        0,
        users,
        names=pa.array(["someone", "guest"]),
        history=columns(2),
        timestamp_s=pa.array([1, 2, 3]),
        list_history=columns(3),
        candidates=candidates,
        labels=labels,
        num_events=3,
        num_positive_events=3,
        folders=folders,
        **lists,
    )


def test_more_lists_than_ids_tell_apart_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "most", MAX_LISTS - 1)
    ids = pq.read_table(str(part_file(tmp_path / "most" / "lists", 0)))["list_id"].to_pylist()
    assert ids == [5 * MAX_LISTS, 6 * MAX_LISTS, 7 * MAX_LISTS - 1]
    told = r"user 'guest' has 2 candidate lists, numbered up to 1,048,576; .* tell 1,048,576 lists .*: leave this guest"
    with pytest.raises(UserError, match=told):
        write(tmp_path / "more", MAX_LISTS)
    assert not part_file(tmp_path / "more" / "users", 0).exists()
