"""Titles and profiles in the order of keys, and which items have none."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from dpo4rec_ray.config import Config
from dpo4rec_ray.datasets.source import ITEMS
from dpo4rec_ray.prepare import assemble
from dpo4rec_ray.prepare.assemble import catalogue_table, user_blocks
from dpo4rec_ray.prepare.data_report import Untitled
from dpo4rec_ray.store.schemas import validate_table


def keys(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def test_items_come_in_the_order_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "CAST_ROWS", 2)  # as with gigabytes of titles
    rows = pa.Table.from_batches(
        [
            pa.RecordBatch.from_pylist([{"raw_id": name, "title": title, "attributes": words}], ITEMS)
            for name, title, words in (("c", "Sea", ["x", "y"]), ("a", "", ["z"]), ("e", "Sun", None))
        ]
    ).append_column("key", pa.array(keys(3, 1, 5)))
    item_keys = keys(1, 2, 3, 4, 5)
    table, untitled = catalogue_table(item_keys, (item_keys, pa.array(list("abcde"))), rows)
    table = validate_table("items", table)
    assert table["title"].to_pylist() == ["item a", "item b", "Sea", "item d", "Sun"]
    assert table["attributes"].to_pylist() == [["z"], [], ["x", "y"], [], []]
    assert table["title"].num_chunks == 3
    assert untitled == Untitled(3, 2, ["b", "d"])  # "a" is in the file, with an empty title


def test_profiles_are_cut_by_partition() -> None:
    rows = pa.table({"key": keys(1, 3), "profile": ["one", "three"]})
    config = Config.model_validate({"reward": {"num_folds": 2}})
    blocks, without = user_blocks(config, keys(1, 2, 3, 4), np.array([1, 3]), rows, 0.0)
    assert [block.profile.to_pylist() for block in blocks] == [["one"], ["", "three", ""]] and without == 2
    assert all(block.profile.type == pa.string() for block in blocks)
