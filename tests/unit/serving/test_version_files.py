"""The files of a published version: their content, and error messages that name a damaged one."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo4rec_ray.config import read_config
from dpo4rec_ray.core.keys import string_key, string_keys
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.evaluation.systems import HEADLINE
from dpo4rec_ray.rerankers.card import read_card as read_reranker_card
from dpo4rec_ray.serving.publish import publish
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.version_check import load_version
from dpo4rec_ray.serving.version_files import UNKNOWN, KeyIndex, VersionFiles, read_card
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.reading import read_vectors
from tests.serving_world import MODELS, OPENED

ARRAYS = [
    "item_vectors.npy",
    "user_keys.npy",
    "user_rows.npy",
    "user_sides.npy",
    "user_standard.npy",
    "user_vector_rows.npy",
]
FILES = [
    *ARRAYS,
    "items.arrow",
    "users.arrow",
    "texts.arrow",
    "recorded.json",
    "version.json",
    "reranker/model.safetensors",
    "reranker/reranker.json",
]

ids = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def keys_of(texts: list[str]) -> np.ndarray:
    content = [text.encode() for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in content], dtype=np.int64)])
    return string_keys(offsets, np.frombuffer(b"".join(content), np.uint8))


@given(st.lists(ids | st.text(st.sampled_from("ab\0é"), max_size=20), max_size=20))
@settings(max_examples=200, deadline=None)
def test_the_key_of_one_string_is_that_of_many(texts: list[str]) -> None:
    assert [string_key(text.encode()) for text in texts] == keys_of(texts).tolist()


@given(st.lists(ids, unique=True, max_size=60), st.lists(ids, max_size=20))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_index_is_a_dictionary(tmp_path: Path, known: list[str], asked: list[str]) -> None:
    KeyIndex.write(tmp_path, "user", keys_of(known))
    index = KeyIndex(tmp_path, "user")
    rows = {one: row for row, one in enumerate(known)}
    for one in [*known, *asked]:
        assert index.row(one) == rows.get(one, UNKNOWN)


@pytest.mark.parametrize("name", MODELS)
def test_a_version_holds_what_the_run_does(published: Registry, served_run: RunDir, name: str) -> None:
    version = VersionFiles(published.folder(name))
    users, items = served_run.read("users").to_pylist(), served_run.read("items").to_pylist()
    assert (version.card.num_users, version.card.num_items) == (len(users), len(items))
    knowledge = served_run.read("knowledge", 0).to_pylist()
    texts = {row["subject_id"]: row["text"] for row in knowledge if row["subject"] == "user"}
    for row, user in enumerate(users):
        assert version.user_index.row(user["raw_id"]) == row
        assert version.user_id(row) == user["raw_id"]
        assert version.history(row) == (user["history_item_ids"], user["history_ratings"])
        assert version.text(row) == (texts.get(row, "") if version.card.knowledge else "")
    for row, item in enumerate(items):
        assert version.item_rows[item["raw_id"]] == row
        assert (version.item_id(row), version.title(row)) == (item["raw_id"], item["title"])
    if version.card.knowledge:
        np.testing.assert_array_equal(version.item_vectors, read_vectors(served_run, 0, "item")[1])
    else:
        assert version.item_vectors is None
    fit = read_reranker_card(served_run.path("per_list") / "rerankers" / MODELS[name])["info"]["metrics"]
    assert version.card.metrics == {name: fit[f"test {name}"] for name in HEADLINE}
    if MODELS[name] in OPENED:
        return
    summary = json.loads((served_run.root / "summary.json").read_text(encoding="utf-8"))
    backbone, system, seed = MODELS[name].split("-")
    (metrics,) = [
        one
        for one in summary["evaluation"]
        if (one["backbone"], one["system"], one["seed"]) == (backbone, system, int(seed.removeprefix("seed")))
    ]
    assert version.card.metrics == {name: pytest.approx(metrics[name], abs=1e-6) for name in HEADLINE}


def test_the_parts_of_users_without_knowledge(published: Registry) -> None:
    version = VersionFiles(published.folder("v1"))
    standard, sides, there = version.user_parts(np.array([UNKNOWN, 3, UNKNOWN, 0, 3]))
    assert there.tolist() == [False, True, False, True, True] and len(standard) == len(sides) == 5
    for parts in (standard, sides):
        np.testing.assert_array_equal(parts[1], parts[4])
        assert not np.array_equal(parts[1], parts[3])


def refused(folder: Path, file: str) -> None:
    """The error names the file, or at least the folder of the version."""
    with pytest.raises(UserError) as error:
        load_version(folder)
    assert str(folder) in str(error.value), file


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_missing_or_damaged_is_refused(registry: Registry, file: str) -> None:
    folder = registry.folder("v1")
    path = folder / file
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:-1], content[:3], b"", bytes(len(content))):
        path.write_bytes(damaged)
        refused(folder, file)
    path.unlink()
    refused(folder, file)
    path.write_bytes(content)
    load_version(folder)


@pytest.mark.parametrize("file", ARRAYS)
def test_nothing_is_unpickled(registry: Registry, tmp_path: Path, file: str) -> None:
    folder = registry.folder("v1")
    touched = tmp_path / "touched"
    array = np.empty(1, object)
    array[0] = Touch(touched)
    np.save(folder / file, array, allow_pickle=True)
    refused(folder, file)
    (folder / file).write_bytes(pickle.dumps(Touch(touched)))
    refused(folder, file)
    assert not touched.exists()


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", [*ARRAYS, "users.arrow", "items.arrow", "texts.arrow"])
def test_files_of_another_size_are_refused(registry: Registry, file: str) -> None:
    """As after a copy that mixed two versions: each file can be read, but they do not fit."""
    folder = registry.folder("v1")
    if file.endswith(".npy"):
        np.save(folder / file, np.load(folder / file)[:-1])
    else:
        with pa.OSFile(str(folder / file)) as source:
            whole = pa.ipc.open_file(source).read_all()
        with pa.ipc.new_file(str(folder / file), whole.schema) as writer:
            writer.write_table(whole.slice(0, len(whole) - 1))
    refused(folder, file)


def test_rows_that_point_nowhere_are_refused(registry: Registry) -> None:
    folder = registry.folder("v1")
    rows = np.load(folder / "user_rows.npy")
    np.save(folder / "user_rows.npy", np.full_like(rows, len(rows) + 10**6))
    refused(folder, "user_rows.npy")


def test_another_format_is_refused(registry: Registry) -> None:
    file = registry.folder("v1") / "version.json"
    card = json.loads(file.read_text(encoding="utf-8"))
    for change in ({"format": 2}, {"unheard": 1}):
        file.write_text(json.dumps(card | change), encoding="utf-8")
        with pytest.raises(UserError, match=r"version\.json"):
            VersionFiles(registry.folder("v1"))


def test_a_version_of_before_release_0_2_is_read(registry: Registry) -> None:
    """Its metrics were called figures, and reranker_history max_history."""
    file, now = registry.folder("v1") / "version.json", read_card(registry.folder("v1"))
    card = json.loads(file.read_text(encoding="utf-8"))
    assert now.metrics and "figures" not in card
    card["figures"], card["max_history"] = card.pop("metrics"), card.pop("reranker_history")
    file.write_text(json.dumps(card), encoding="utf-8")
    assert read_card(registry.folder("v1")) == now
    load_version(registry.folder("v1"))


def test_publishing_refuses_what_is_not_there(registry: Registry, served_run: RunDir, tmp_path: Path) -> None:
    config = read_config(served_run.root)
    with pytest.raises(UserError, match="versions never change"):
        publish(config, served_run, registry.folder("v1"), "v1")
    with pytest.raises(UserError, match="prm-statistics-seed1"):  # names those that are there
        publish(config, served_run, registry.folder("new"), "new", "prm-oracle-seed0")
    with pytest.raises(
        UserError, match="texts of 'random-texts', and only those of this run's rounds 0 to 0"
    ):
        publish(config, served_run, registry.folder("new"), "new", "prm-random-texts-seed0")
    with pytest.raises(UserError):
        publish(config, RunDir(tmp_path), registry.folder("new"), "new")
    assert not registry.folder("new").exists()


def test_publishing_reads_each_artifact_once(
    registry: Registry, served_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items and item vectors as a whole, all else part by part."""
    whole: list[str] = []
    read = RunDir.read

    def noted(store: RunDir, name: str, *arguments: Any, **more: Any) -> pa.Table:
        whole.append(name)
        return read(store, name, *arguments, **more)

    monkeypatch.setattr(RunDir, "read", noted)
    publish(read_config(served_run.root), served_run, registry.folder("once"), "once", MODELS["v1"])
    assert whole == ["items", "knowledge"]


def test_the_best_fit_on_validation_is_published(registry: Registry, served_run: RunDir) -> None:
    card = publish(read_config(served_run.root), served_run, registry.folder("best"), "best")
    found = {}
    for folder in (served_run.path("per_list") / "rerankers").iterdir():
        info = json.loads((folder / "reranker.json").read_text(encoding="utf-8"))["info"]
        if info["system"] == "statistics":
            found[folder.name] = info["metrics"][f"valid {info['fit']['metric']}"]
    assert found[card.model] == max(found.values()) and len(found) == 4
