"""Counted texts: how many per user, what the first one counts, and what an oracle may know."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from dpo4rec_ray.config import default_config
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.texts.counted_texts import ORACLE, CountedShard, CountedTexts

SPLITS = ("train", "valid", "test", "train")
HISTORIES = [[0, 1, 2, 3], [1, 2], [], [3]]
RATINGS = [[5.0, 4.0, 5.0, 1.0], [4.0, 2.0], [], [5.0]]
# user, split, candidates and labels of the lists. User 2 likes something in a test list alone, user 3 nothing at all.
LISTS = [
    (0, "train", [4, 5], [1, 0]),
    (0, "valid", [5, 6], [1, 0]),
    (0, "train", [6, 4], [0, 1]),
    (0, "test", [6, 7], [1, 0]),
    (1, "valid", [7, 5], [0, 1]),
    (2, "test", [4, 7], [1, 1]),
    (3, "train", [6, 7], [0, 0]),
]


@pytest.fixture
def store(tmp_path: Path) -> RunDir:
    """Four users; item i is called 'Item i' and has the genre g0 or g1."""
    made = RunDir(tmp_path)
    users = {
        "user_id": range(4),
        "raw_id": ["a", "b", "c", "d"],
        "profile": [""] * 4,
        "split": SPLITS,
        "fold": [0] * 4,
        "history_item_ids": HISTORIES,
        "history_ratings": RATINGS,
    }
    items = {
        "item_id": range(8),
        "raw_id": [f"i{i}" for i in range(8)],
        "title": [f"Item {i}" for i in range(8)],
        "attributes": [[f"genre: g{i % 2}"] for i in range(8)],
    }
    lists = {
        "list_id": range(len(LISTS)),
        "user_id": [user for user, *_ in LISTS],
        "split": [split for _, split, *_ in LISTS],
        "timestamp_s": [0] * len(LISTS),
        "candidate_item_ids": [candidates for *_, candidates, _ in LISTS],
        "labels": [labels for *_, labels in LISTS],
        "history_item_ids": [[]] * len(LISTS),
        "history_ratings": [[]] * len(LISTS),
    }
    for name, columns in (("users", users), ("items", items), ("lists", lists)):
        made.start(name)
        made.write(name, pa.table({key: list(values) for key, values in columns.items()}))
        made.finish(Manifest(name, "", 4))
    return made


def counted(
    store: RunDir, subject: str, *changes: str, low: int = 0, high: int = 4
) -> dict[tuple[int, int], str]:
    """(user, sample) -> text, of one shard."""
    config = default_config(["data.positive_rating=4", "prompt.ratings=true", *changes])
    shards = [CountedShard("none of ours", 0, 0), CountedShard(subject, low, high)]
    row = CountedTexts(config, store, shards)({"shard": 1})
    assert (row["shard"], row["subject"], row["totals"]) == (
        1,
        subject,
        {"users": len(set(row["subject_ids"]))},
    )
    found = dict(zip(zip(row["subject_ids"], row["sample_ids"], strict=True), row["texts"], strict=True))
    assert len(found) == len(row["texts"])
    return found


WHOLE = "This user likes g0 (2), g1 (1). Liked: Item 2; Item 0; Item 1."


def test_everybody_has_one_text_of_the_whole_history(store: RunDir) -> None:
    found = counted(store, "statistics")
    assert list(found) == [(user, 0) for user in range(4)]
    assert found[0, 0] == WHOLE
    assert found[2, 0] == "Nothing is known about this user's tastes."


def test_a_shard_holds_its_users_alone(store: RunDir) -> None:
    whole = counted(store, "statistics")
    assert counted(store, "statistics", low=1, high=3) == {key: whole[key] for key in ((1, 0), (2, 0))}


def test_training_users_have_several_texts_first_of_all_and_then_of_halves(store: RunDir) -> None:
    found = counted(store, "statistics", "reward.reader_texts=5")
    assert sorted(found) == sorted([(u, k) for u in (0, 3) for k in range(5)] + [(1, 0), (2, 0)])
    assert found[0, 0] == WHOLE
    halves = {found[0, number] for number in range(1, 5)}
    assert WHOLE not in halves and len(halves) > 1
    assert all(
        text.count("Item") in (1, 2) for text in halves
    )  # of two events, one of which may be item 3, which was not liked
    assert {found[3, number] for number in range(5)} == {found[3, 0]}, "one event is its own half"


def test_texts_depend_on_the_run_seed(store: RunDir) -> None:
    several = "reward.reader_texts=5"
    found = counted(store, "statistics", several)
    assert counted(store, "statistics", several) == found
    assert counted(store, "statistics", several, "run.seed=1") != found


def test_an_oracle_knows_later_likes_of_training_and_validation_lists_alone(store: RunDir) -> None:
    """User 0 likes items 4 (twice) and 5, and 6 in a test list; user 1 likes item 5; users 2 and 3 like nothing that counts."""
    found = counted(store, ORACLE)
    assert found == {
        (0, 0): "This user likes g1 (1), g0 (1). Liked: Item 5; Item 4.",
        (1, 0): "This user likes g1 (1). Liked: Item 5.",
    }


def test_without_ratings_everything_in_the_history_is_liked(store: RunDir) -> None:
    found = counted(store, "statistics", "prompt.ratings=false")
    assert found[0, 0] == "This user likes g1 (2), g0 (2). Liked: Item 3; Item 2; Item 1; Item 0."
