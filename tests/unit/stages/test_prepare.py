from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from dpo4rec_ray.config import Config
from dpo4rec_ray.datasets import RawTables
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.stages.prepare import _tables

NUM_USERS, NUM_ITEMS = 12, 40


def raw(rng: np.random.Generator, events_per_user: int = 20) -> RawTables:
    users = np.repeat(np.arange(NUM_USERS), events_per_user)
    order = rng.permutation(len(users))
    return RawTables(
        user_raw_ids=[f"u{i}" for i in range(NUM_USERS)],
        profiles=[""] * NUM_USERS,
        item_raw_ids=[f"i{i}" for i in range(NUM_ITEMS)],
        titles=[f"title {i}" for i in range(NUM_ITEMS)],
        attributes=[["genre: drama"]] * NUM_ITEMS,
        user_index=users[order],
        item_index=np.concatenate([rng.permutation(NUM_ITEMS)[:events_per_user] for _ in range(NUM_USERS)])[
            order
        ],
        rating=rng.integers(1, 6, len(users)).astype(np.float32),
        timestamp_s=np.tile(np.arange(events_per_user) * 60 + 1_000_000, NUM_USERS)[order],
        truth=None,
        quarantined={},
    )


def config(**data: object) -> Config:
    return Config.model_validate({"data": {"max_history": 6, "test_frac": 0.2, "valid_frac": 0.2, **data}})


def by_user(table: pa.Table, user: int) -> list[dict]:
    return [row for row in table.to_pylist() if row["user_id"] == user]


def events_of(tables: RawTables, user: int) -> list[tuple[int, int, float]]:
    own = tables.user_index == user
    rows = zip(tables.timestamp_s[own], tables.item_index[own], tables.rating[own], strict=True)
    return sorted((int(t), int(i), float(r)) for t, i, r in rows)


def test_history_comes_first_and_lists_follow_in_time() -> None:
    """20 events: the first min((20+1)//2, 6) = 6 are the history, the other 14 make lists of 4, 4, 4 and 2."""
    source = raw(np.random.default_rng(0))
    tables = _tables(config(), source)
    for user in range(NUM_USERS):
        events = events_of(source, user)
        (row,) = by_user(tables["users"], user)
        assert row["history_item_ids"] == [item for _, item, _ in events[:6]]
        assert row["history_ratings"] == [rating for *_, rating in events[:6]]
        lists = by_user(tables["lists"], user)
        assert len(lists) == 4
        for number, one in enumerate(lists):
            block = events[6 + 4 * number : 10 + 4 * number]
            assert one["timestamp_s"] == block[0][0]
            assert one["history_item_ids"] == [item for _, item, _ in events[: 6 + 4 * number]][-5:]
            labels = dict(zip(one["candidate_item_ids"], one["labels"], strict=True))
            assert len(labels) == 10
            for _, item, rating in block:
                assert labels[item] == (1.0 if rating >= 4 else 0.0)
            drawn = set(labels) - {item for _, item, _ in block}
            assert all(labels[item] == 0.0 for item in drawn)
            assert one["split"] == by_user(tables["users"], user)[0]["split"]


def test_equal_timestamps_keep_file_order() -> None:
    source = raw(np.random.default_rng(1))
    source.timestamp_s[:] = 5
    tables = _tables(config(), source)
    in_file = source.item_index[source.user_index == 3].tolist()
    assert by_user(tables["users"], 3)[0]["history_item_ids"] == in_file[:6]


def test_nothing_of_a_list_depends_on_its_labels_or_on_what_comes_later() -> None:
    """Every rating from the second list on is changed: prompts and everything known before those lists stay."""
    source = raw(np.random.default_rng(2))
    before = _tables(config(), source)
    changed = raw(np.random.default_rng(2))
    later = changed.timestamp_s >= 1_000_000 + 60 * 10
    changed.rating[later] = 6 - changed.rating[later]
    after = _tables(config(), changed)
    assert before["users"].equals(after["users"])
    first, second = (
        [row for row in tables["lists"].to_pylist() if row["timestamp_s"] < 1_000_000 + 600]
        for tables in (before, after)
    )
    assert first == second
    unlabelled = [name for name in before["lists"].column_names if name not in ("labels", "history_ratings")]
    assert before["lists"].select(unlabelled).equals(after["lists"].select(unlabelled))


def test_the_same_seed_gives_the_same_tables_and_another_seed_others() -> None:
    source = raw(np.random.default_rng(3))
    assert _tables(config(), source)["lists"].equals(_tables(config(), source)["lists"])
    other = Config.model_validate({**config().model_dump(), "run": {"seed": 1}})
    assert not _tables(other, source)["lists"].equals(_tables(config(), source)["lists"])


def test_a_catalogue_too_small_for_a_list_is_refused() -> None:
    source = raw(np.random.default_rng(4))
    with pytest.raises(UserError, match=r"data\.num_candidates = 40"):
        _tables(config(num_candidates=40), source)
