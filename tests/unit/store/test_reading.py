from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo4rec_ray.config import default_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store import artifacts
from dpo4rec_ray.store.artifacts import Manifest, RunDir, write_part
from dpo4rec_ray.store.reading import knowledge_vectors, read_all_vectors, read_vectors, reader_vectors
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
    odd = users_per_shard(store, ("train",), size, lambda ids, held_out: (ids % 2 == 1) & ~held_out)
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


Texts = list[tuple[str, int, int, list[float]]]  # subject, user, sample, vector


def write_vectors(store: RunDir, artifact: str, texts: Texts, round_id: int = 0) -> None:
    """The rows in an arbitrary order, in two parts."""
    store.start(artifact, round_id)
    shuffled = [texts[place] for place in np.random.default_rng(0).permutation(len(texts))]
    for part, some in enumerate((shuffled[::2], shuffled[1::2])):
        columns = {
            "round": [round_id] * len(some),
            "subject": [subject for subject, *_ in some],
            "subject_id": [user for _, user, *_ in some],
            "sample_id": [sample for _, _, sample, _ in some],
            "text": [""] * len(some),
            "vector": [vector for *_, vector in some],
        }
        write_part(
            store.path(artifact, round_id), "knowledge", pa.table(columns), part
        )  # as the stages do: one schema for both
    store.finish(Manifest(artifact, "", len(texts)), round_id)


@pytest.fixture
def counted(tmp_path: Path) -> RunDir:
    """Four users. In `knowledge` everybody has two texts of an LLM, (10 + user, sample). In `references` user 0 has three
    statistical ones, (user, sample), users 1 and 3 have one, user 2 has none; user 3 has an oracle's."""
    store = RunDir(tmp_path)
    store.start("users")
    store.finish(Manifest("users", "", 4))
    own: Texts = [("user", user, sample, [10.0 + user, sample]) for user in range(4) for sample in range(2)]
    write_vectors(store, "knowledge", [*own, ("item", 0, 0, [99.0, 0.0])])
    some = [(0, 0), (0, 1), (0, 2), (1, 0), (3, 0)]
    texts: Texts = [("statistics", user, sample, [float(user), float(sample)]) for user, sample in some]
    write_vectors(store, "references", [*texts, ("oracle", 3, 0, [7.0, 7.0])])
    return store


def test_all_texts_of_all_users(counted: RunDir) -> None:
    """Who has fewer texts has them again, who has none has zeros."""
    found = read_all_vectors(counted, "statistics")
    assert found.dtype == np.float32 and found.tolist() == [
        [[0, 0], [0, 1], [0, 2]],
        [[1, 0], [1, 0], [1, 0]],
        [[0, 0], [0, 0], [0, 0]],
        [[3, 0], [3, 0], [3, 0]],
    ]
    assert read_all_vectors(counted, "user")[2].tolist() == [[12, 0], [12, 1]]
    assert read_all_vectors(counted, "oracle").tolist() == [[[0, 0]]] * 3 + [[[7, 7]]]


def test_texts_that_are_not_there_say_what_to_run(counted: RunDir) -> None:
    write_vectors(counted, "references", [("oracle", 3, 0, [7.0, 7.0])])
    with pytest.raises(UserError, match=r"no texts of 'statistics'.*--from references"):
        read_all_vectors(counted, "statistics")
    write_vectors(counted, "knowledge", [("item", 0, 0, [1.0])])
    with pytest.raises(UserError, match=r"no texts of 'user'.*--from encode"):
        read_all_vectors(counted, "user")


def test_a_reader_sees_the_texts_that_the_recipe_names(counted: RunDir) -> None:
    def read(reader: str, source: str = "vllm") -> np.ndarray:
        changes = [f"reward.reader={reader}", f"llm.source={source}", "reward.reader_texts=3"]
        return reader_vectors(default_config(changes), counted, 0)

    assert read('["llm"]').tolist() == read_all_vectors(counted, "user").tolist()
    assert read('["statistics"]').tolist() == read_all_vectors(counted, "statistics").tolist()
    both = read('["statistics", "llm"]')
    assert both.shape == (4, 5, 2) and both[0].tolist() == [[0, 0], [0, 1], [0, 2], [10, 0], [10, 1]]
    assert read('["llm", "statistics"]')[0, 0].tolist() == [10, 0], "the first one is ranked with"
    assert read('["statistics"]', "statistics").tolist() == read('["llm"]').tolist(), "they are the run's own"


def test_a_later_reader_sees_the_texts_of_the_policy_before_it(counted: RunDir) -> None:
    """Counted texts stay the same; those of policy 2 are read in the place of the base LLM's."""
    texts: Texts = [("user", user, 0, [20.0 + user, 0.0]) for user in range(3)]
    texts += [("user", 3, sample, [23.0, float(sample)]) for sample in range(5)]
    write_vectors(counted, "knowledge", texts, round_id=2)
    config = default_config(['reward.reader=["llm", "statistics"]', "reward.reader_texts=2"])
    found, first = reader_vectors(config, counted, 2), reader_vectors(config, counted, 0)
    assert found[0, :2, 0].tolist() == [20, 20], "a training user has one text then, which is read twice"
    assert found[3, :2].tolist() == [[23, 0], [23, 1]], (
        "a validation user has more, of which as many are read"
    )
    assert found.shape == first.shape and found[:, 2:].tolist() == first[:, 2:].tolist()


def test_vectors_that_a_system_ranks_with(counted: RunDir) -> None:
    config = default_config([])
    assert knowledge_vectors(config, counted, 0).tolist() == [[10, 0], [11, 0], [12, 0], [13, 0]]
    assert knowledge_vectors(config, counted, "statistics").tolist() == [[0, 0], [1, 0], [0, 0], [3, 0]]


@pytest.mark.parametrize("seed", range(10))
def test_random_texts_are_another_users(counted: RunDir, seed: int) -> None:
    """Everybody's vector is used once, by somebody else, and the same by the same run seed."""
    num_users = 9
    counted.finish(Manifest("users", "", num_users))
    write_vectors(
        counted, "references", [("statistics", user, 0, [float(user)]) for user in range(num_users)]
    )
    config = default_config([f"run.seed={seed}"])
    found = knowledge_vectors(config, counted, "random")[:, 0].astype(int).tolist()
    assert sorted(found) == list(range(num_users))
    assert not any(user == other for user, other in enumerate(found))
    assert knowledge_vectors(config, counted, "random")[:, 0].astype(int).tolist() == found
    assert knowledge_vectors(default_config(["run.seed=99"]), counted, "random")[:, 0].tolist() != found
