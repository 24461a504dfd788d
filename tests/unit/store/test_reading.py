from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo4rec_ray.store import artifacts
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.store.reading import read_vectors
from dpo4rec_ray.store.user_rows import UserRows, users_per_shard

SPLITS = np.array(["train", "valid", "test"])


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """100 users in three parts of small row groups; user i is of split i % 3."""
    monkeypatch.setattr(artifacts, "ROWS_PER_GROUP", 7)
    store = RunDir(tmp_path)
    store.start("users")
    for part, (low, high) in enumerate([(0, 40), (40, 41), (41, 100)]):
        ids = np.arange(low, high)
        columns = {
            "user_id": ids,
            "raw_id": [f"u{i}" for i in ids],
            "profile": [""] * len(ids),
            "split": SPLITS[ids % 3],
            "fold": np.zeros(len(ids), np.int32),
            "history_item_ids": [[int(i)] for i in ids],
            "history_ratings": [[1.0]] * len(ids),
        }
        store.write("users", pa.table(columns), part=part)
    store.finish(Manifest("users", "", 100))
    return store


@pytest.mark.parametrize(("low", "high"), [(0, 100), (0, 1), (5, 9), (38, 44), (99, 100), (50, 50)])
def test_a_range_of_users_is_what_the_whole_table_holds(store: RunDir, low: int, high: int) -> None:
    rows = UserRows(store, ("train", "valid")).read(low, high).to_pylist()
    assert [row["user_id"] for row in rows] == [i for i in range(low, high) if i % 3 != 2]
    assert all(row["raw_id"] == f"u{row['user_id']}" for row in rows)


@pytest.mark.parametrize("size", [1, 7, 33, 100, 1000])
def test_users_per_shard(store: RunDir, size: int) -> None:
    counts = users_per_shard(store, ("train",), size)
    expected = [sum(i % 3 == 0 for i in range(low, min(low + size, 100))) for low in range(0, 100, size)]
    assert counts.tolist() == expected
    odd = users_per_shard(store, ("train",), size, lambda ids: ids % 2 == 1)
    assert odd.sum() == sum(i % 3 == 0 and i % 2 == 1 for i in range(100))


def test_only_needed_row_groups_are_decoded(store: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    reader = UserRows(store, ("train",))
    asked: list[int] = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, group: asked.append(group) or read(self, group)
    )
    reader.read(8, 13)
    assert asked == [1], "users 7 to 13 are the second row group of the first part"


def test_vectors_of_the_first_texts(tmp_path: Path) -> None:
    """In id order, whatever the order of rows and parts; without other samples and the other subject."""
    store = RunDir(tmp_path)
    store.start("knowledge")
    rows = [(subject, i, sample) for subject in ("user", "item") for i in range(8) for sample in range(2)]
    shuffled = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    for part, some in enumerate((shuffled[:11], shuffled[11:])):
        columns = {
            "round": [0] * len(some),
            "subject": [subject for subject, _, _ in some],
            "subject_id": [i for _, i, _ in some],
            "sample_id": [sample for _, _, sample in some],
            "text": [""] * len(some),
            "vector": [[float(subject == "user"), i, sample] for subject, i, sample in some],
        }
        store.write("knowledge", pa.table(columns), part=part)
    store.finish(Manifest("knowledge", "", len(rows)))
    for place, subject in enumerate(("item", "user")):
        ids, vectors = read_vectors(store, 0, subject)
        assert ids.tolist() == list(range(8)) and vectors.tolist() == [[place, i, 0] for i in range(8)]
