"""Who is shown as an example, to whom."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from dpo4rec_ray.config import Config, default_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.texts.examples import draw_examples

NUM_USERS = 30


@pytest.fixture
def store(tmp_path: Path) -> RunDir:
    """Every third user is a training user; the training users 0 and 3 have no history."""
    made = RunDir(tmp_path)
    made.start("users")
    for part, ids in enumerate((range(20), range(20, NUM_USERS))):
        histories = [[] if i in (0, 3) else list(range(12)) for i in ids]
        columns = {
            "user_id": list(ids),
            "raw_id": [f"u{i}" for i in ids],
            "profile": [f"user {i}" for i in ids],
            "split": [("train", "valid", "test")[i % 3] for i in ids],
            "fold": [0] * len(ids),
            "history_item_ids": histories,
            "history_ratings": [[4.0] * len(history) for history in histories],
        }
        made.write("users", pa.table(columns), part=part)
    made.finish(Manifest("users", "", NUM_USERS))
    return made


def config(number: int, seed: int = 0) -> Config:
    return default_config([f"prompt.examples={number}", f"run.seed={seed}"])


def test_examples_are_training_users_with_a_history(store: RunDir) -> None:
    for seed in range(20):
        found = draw_examples(config(3, seed), store)
        ids = {one.user_id for one in found}
        assert len(ids) == 4 and all(i % 3 == 0 and i > 3 for i in ids)
        assert found == draw_examples(config(3, seed), store)
    assert {tuple(one.item_ids) for one in found} == {tuple(range(12))}
    assert len({draw_examples(config(1, seed), store)[0].user_id for seed in range(20)}) > 3


def test_without_examples_nothing_is_read(tmp_path: Path) -> None:
    assert draw_examples(config(0), RunDir(tmp_path)) == []


def test_too_few_training_users(store: RunDir) -> None:
    assert len(draw_examples(config(7), store)) == 8
    with pytest.raises(UserError, match="has 8 training users with a history; lower it"):
        draw_examples(config(8), store)
