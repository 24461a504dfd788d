from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow as pa
import pytest

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store.artifacts import Manifest, RunDir, folder_hash, write_json, write_part
from dpo4rec_ray.store.schemas import SCHEMAS, validate_table


def truth(user_ids: list[int]) -> pa.Table:
    return pa.table({"user_id": user_ids, "tastes": [["genre: drama"]] * len(user_ids)})


def test_an_artifact_is_complete_only_with_its_manifest(tmp_path: Path) -> None:
    store = RunDir(tmp_path)
    store.start("truth")
    store.write("truth", truth([0, 1]))
    assert store.manifest("truth") is None
    with pytest.raises(UserError, match="missing or incomplete"):
        store.read("truth")
    store.finish(Manifest("truth", "abc", 2))
    assert store.require("truth").fingerprint == "abc"
    assert store.read("truth").num_rows == 2


def test_starting_again_removes_what_was_there(tmp_path: Path) -> None:
    store = RunDir(tmp_path)
    store.start("truth")
    store.write("truth", truth([0]), part=3)
    store.finish(Manifest("truth", "abc", 1))
    store.start("truth")
    assert store.manifest("truth") is None
    assert not list(store.path("truth").glob("*.parquet"))


def test_starting_with_keep_removes_only_the_manifest(tmp_path: Path) -> None:
    store = RunDir(tmp_path)
    store.start("truth")
    store.write("truth", truth([0]), part=3)
    store.finish(Manifest("truth", "abc", 1))
    store.start("truth", keep=True)
    assert store.manifest("truth") is None
    assert [file.name for file in store.path("truth").glob("*.parquet")] == ["part-00003.parquet"]


def test_conditions_and_split_filter_rows(tmp_path: Path) -> None:
    store = RunDir(tmp_path)
    store.start("users")
    columns = {
        "user_id": list(range(6)),
        "raw_id": list("abcdef"),
        "profile": [""] * 6,
        "split": ["train", "test"] * 3,
        "fold": [0] * 6,
        "history_item_ids": [[1]] * 6,
        "history_ratings": [[5.0]] * 6,
    }
    store.write("users", pa.table(columns))
    store.finish(Manifest("users", "abc", 6))
    found = store.read("users", split="train", where=[("user_id", ">=", 1), ("user_id", "<", 5)])
    assert found["user_id"].to_pylist() == [2, 4]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column tastes"):
        write_part(tmp_path, "truth", pa.table({"user_id": [1]}), 0)
    assert list(tmp_path.iterdir()) == []


def test_columns_are_cast_to_the_schema() -> None:
    table = validate_table("truth", truth([7]))
    assert table.schema.equals(SCHEMAS["truth"])
    with pytest.raises(UserError, match="another type"):
        validate_table("truth", pa.table({"user_id": ["seven"], "tastes": [["x"]]}))


def test_an_empty_table_takes_every_schema() -> None:
    for name, schema in SCHEMAS.items():
        empty = pa.table({column: [] for column in schema.names})
        assert validate_table(name, empty).schema.equals(schema)


def test_json_never_holds_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": math.nan, "b": [1.0, math.inf], "c": (1, 2)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1.0, None], "c": [1, 2]}


def test_a_broken_manifest_is_named(tmp_path: Path) -> None:
    store = RunDir(tmp_path)
    (store.start("truth") / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not a manifest"):
        store.manifest("truth")


def test_folder_hash_follows_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = folder_hash(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert folder_hash(tmp_path) != first


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match=r"runs/demo/data/users/manifest\.json: one of its folders is a file"):
        RunDir(tmp_path / "runs" / "demo").manifest("users")
