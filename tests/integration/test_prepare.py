"""The prepare stage on real Ray: every source and protocol against a plain loop over events that the test knows."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo4rec_ray.datasets.files import plan_splits
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.prepare import ingest
from dpo4rec_ray.stages import prepare
from tests.conftest import local_ray
from tests.raw_data import (
    DAY_S,
    NUM_ITEMS,
    SOURCES,
    Event,
    adds_up,
    amazon_2018_ratings,
    lines,
    make_events,
    ml_1m,
    ml_latest,
    ordered,
    own_csv,
    prepared,
    raw_ids,
    report_of,
)

pytestmark = pytest.mark.ray
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def ray_local() -> Iterator[None]:
    with local_ray(2, store_mib=256):
        yield


@pytest.mark.parametrize("protocol", ["user", "paper", "time"])
@pytest.mark.parametrize("source", SOURCES)
def test_no_list_sees_its_own_future(tmp_path: Path, source: str, protocol: str) -> None:
    """Histories end before the list, in the protocol's order; the LLM's history before the user's first list."""
    raw = tmp_path / "raw"
    raw.mkdir()
    events = make_events()
    data = SOURCES[source](raw, events)
    store = prepared(tmp_path / "run", {**data, "raw_dir": str(raw), "protocol": protocol})
    adds_up(store)
    names = raw_ids(store)
    expected = ordered(events, protocol)
    users = {row["user_id"]: row for row in store.read("users").to_pylist()}
    assert sorted(row["raw_id"] for row in users.values()) == sorted(expected)
    assert list(users) == sorted(users)
    seen_after: Counter[int] = Counter()
    lists = store.read("lists").to_pylist()
    assert len({row["list_id"] for row in lists}) == len(lists)
    for row in lists:
        own = expected[users[row["user_id"]]["raw_id"]]
        labels = {names[i]: label for i, label in zip(row["candidate_item_ids"], row["labels"], strict=True)}
        place_of = {event.item: place for place, event in enumerate(own)}
        start = next(p for p, e in enumerate(own) if e.timestamp_s == row["timestamp_s"] and e.item in labels)
        shown = len(users[row["user_id"]]["history_item_ids"])
        size = 0
        while start + size < len(own) and own[start + size].item in labels and size < 4:
            size += 1
        assert start >= shown
        before = [event.item for event in own[max(0, start - 5) : start]]
        assert [names[i] for i in row["history_item_ids"]] == before
        assert row["history_ratings"] == [event.rating for event in own[max(0, start - 5) : start]]
        for event in own[start : start + size]:
            if labels[event.item]:
                assert event.rating >= 4
        positives = [item for item, label in labels.items() if label]
        assert all(start <= place_of[item] < start + 4 for item in positives)
        assert len(labels) == 10
        seen_after[row["user_id"]] += 1
        if protocol == "time":
            met_before = {event.item for event in own[:start]}
            assert not met_before & set(labels)
    for user_id, user in users.items():
        own = expected[user["raw_id"]]
        shown = len(user["history_item_ids"])
        assert [names[i] for i in user["history_item_ids"]] == [event.item for event in own[:shown]]
        if protocol != "time":
            assert shown == min((len(own) + 1) // 2, 6)
            assert seen_after[user_id] == -(-(len(own) - shown) // 4)


@pytest.mark.parametrize("protocol", ["user", "paper"])
def test_users_of_the_test_split_have_no_other_list(tmp_path: Path, protocol: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    store = prepared(
        tmp_path / "run", {**ml_1m(raw, make_events()), "raw_dir": str(raw), "protocol": protocol}
    )
    split_of = dict(
        zip(*(store.read("users")[name].to_pylist() for name in ("user_id", "split")), strict=True)
    )
    lists = store.read("lists").to_pylist()
    assert all(row["split"] == split_of[row["user_id"]] for row in lists)
    # 40 users: 8 for testing, 20 % of the other 32 (6.4) for validation
    assert Counter(split_of.values()) == {"train": 26, "valid": 6, "test": 8}


def test_with_a_cut_in_time_nothing_of_the_future_is_trained_on(tmp_path: Path) -> None:
    """Every training list ends before the first validation list begins, and so on; user splits follow their lists."""
    raw = tmp_path / "raw"
    raw.mkdir()
    events = make_events()
    store = prepared(tmp_path / "run", {**ml_1m(raw, events), "raw_dir": str(raw), "protocol": "time"})
    names, expected = raw_ids(store), ordered(events, "time")
    users = store.read("users").to_pylist()
    spans: dict[str, list[tuple[int, int]]] = {"train": [], "valid": [], "test": []}
    splits_of: dict[int, set[str]] = {}
    for row in store.read("lists").to_pylist():
        own = expected[users[row["user_id"]]["raw_id"]]
        start = next(p for p, e in enumerate(own) if e.timestamp_s == row["timestamp_s"])
        # what is known of a list's end: its positives, as an item met later may be among the drawn ones
        positive = {
            names[i] for i, label in zip(row["candidate_item_ids"], row["labels"], strict=True) if label
        }
        end_s = max([own[start].timestamp_s, *(event.timestamp_s for event in own if event.item in positive)])
        spans[row["split"]].append((own[start].timestamp_s, end_s))
        splits_of.setdefault(row["user_id"], set()).add(row["split"])
    assert all(spans.values())
    assert max(end for _, end in spans["train"]) < min(start for start, _ in spans["valid"])
    assert max(end for _, end in spans["valid"]) < min(start for start, _ in spans["test"])
    for user_id, splits in splits_of.items():
        split = users[user_id]["split"]
        assert split in splits
        if splits == {"test"}:
            assert split == "test"
        if split == "test":
            assert splits == {"test"}


@pytest.mark.parametrize("windows", [0, 3])
def test_results_depend_on_neither_partitions_nor_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: int
) -> None:
    """One stream, one block, or many ranges of a plain file; one partition or several: the same artifacts. So it is with users
    that are written once more for each window of test time, in parts of their own.
    """
    drift = {"protocol": "time", "drift_windows": windows, "test_frac": 0.3} if windows else {}
    rng = np.random.default_rng(5)
    rows = [
        f"{int(item)},u{int(user)},{float(rng.integers(1, 6))},{1_000_000_000 + place // 3}"
        for place, (user, item) in enumerate(
            zip(rng.integers(0, 3000, 60_000), rng.zipf(1.3, 60_000) % 900, strict=True)
        )
    ]
    results = []
    for number, (name, partition_mib, split_bytes) in enumerate(
        [("Books.csv", 256, 2**25), ("Books.csv", 1, 100_000), ("Books.csv.gz", 1, 2**25)]
    ):
        raw = tmp_path / f"raw-{number}"
        raw.mkdir()
        lines(rows, raw / name)
        monkeypatch.setattr(ingest, "plan_splits", functools.partial(plan_splits, split_bytes=split_bytes))
        data = {"dataset": "amazon2018", "raw_dir": str(raw), "partition_mib": partition_mib, "user_core": 5}
        data |= drift
        store = prepared(tmp_path / f"run-{number}", data)
        adds_up(store)
        assert report_of(store)["filtered"]["repeated events"] > 100
        results.append({artifact: store.read(artifact) for artifact in prepare.ARTIFACTS})
        num_partitions = 1 if partition_mib == 256 else 2 + (number == 2)
        assert len(list(store.path("lists").glob("*.parquet"))) == num_partitions * (2 if windows else 1)
    assert results[0]["lists"].num_rows > 1000
    for artifact in prepare.ARTIFACTS:
        assert results[0][artifact].equals(results[1][artifact]), artifact
        assert results[0][artifact].equals(results[2][artifact]), artifact


def test_the_core_is_a_fixed_point(tmp_path: Path) -> None:
    """After a 4/5-core every user has 4 items and every item 5 users, and what was dropped is counted."""
    raw = tmp_path / "raw"
    raw.mkdir()
    rng = np.random.default_rng(1)
    events = [
        Event(f"u{int(u)}", f"i{int(i)}", 5, 1_000_000_000 + n)
        for n, (u, i) in enumerate(rng.zipf(1.5, (900, 2)) % 150)
    ]
    data = amazon_2018_ratings(raw, events)
    store = prepared(tmp_path / "run", {**data, "raw_dir": str(raw), "user_core": 4, "item_core": 5})
    adds_up(store)
    pairs = {(event.user, event.item) for event in events}
    while True:
        users, items = Counter(u for u, _ in pairs), Counter(i for _, i in pairs)
        kept = {(u, i) for u, i in pairs if users[u] >= 4 and items[i] >= 5}
        if kept == pairs:
            break
        pairs = kept
    report = report_of(store)
    assert report["rows_kept"] == len(pairs) > 50
    assert set(raw_ids(store)) == {i for _, i in pairs}
    assert set(store.read("users")["raw_id"].to_pylist()) == {u for u, _ in pairs}
    assert report["filtered"]["repeated events"] == len(events) - len({(e.user, e.item) for e in events})
    assert report["quarantined"] == {}


def test_the_earliest_of_duplicates_stays(tmp_path: Path) -> None:
    """By time, then by place in the file: user 1 rated item 7 as 2 at first, whatever the file says first."""
    raw = tmp_path / "raw"
    raw.mkdir()
    events = make_events()
    own = [e for e in events if e.user == "1" and e.item != "7"]
    others = [e for e in events if e.user != "1"]
    first_s = min(e.timestamp_s for e in own) - 10
    again = [Event("1", "7", 5, first_s + 5), Event("1", "7", 2, first_s), Event("1", "7", 4, first_s)]
    store = prepared(tmp_path / "run", {**ml_1m(raw, [*again, *others, *own]), "raw_dir": str(raw)})
    user = next(row for row in store.read("users").to_pylist() if row["raw_id"] == "1")
    assert (raw_ids(store)[user["history_item_ids"][0]], user["history_ratings"][0]) == ("7", 2.0)
    assert report_of(store)["filtered"] == {"repeated events": 2}
    assert report_of(store)["quarantined"] == {}


def test_parquet_is_cut_into_partitions_too(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "events").mkdir(parents=True)
    rng = np.random.default_rng(2)
    table = pa.table(
        {
            "who": pa.array([f"user-{number:08d}" for number in rng.integers(0, 4000, 150_000)]),
            "what": rng.integers(0, 500, 150_000),
            "stars": rng.integers(1, 6, 150_000),
            "when": 1_000_000_000 + rng.permutation(150_000),
        }
    )
    pq.write_table(table, raw / "events" / "a.parquet", row_group_size=40_000, use_dictionary=False)
    columns = {"user": "who", "item": "what", "rating": "stars", "timestamp": "when"}
    data = {"dataset": "table", "table": {"interactions": "events/*.parquet", **columns}, "raw_dir": str(raw)}
    store = prepared(tmp_path / "run", {**data, "partition_mib": 1})
    adds_up(store)
    assert len(list(store.path("lists").glob("*.parquet"))) > 3
    assert store.read("users")["user_id"].to_pylist() == list(range(4000))


def test_users_with_one_event_are_left_out_and_counted(tmp_path: Path) -> None:
    """One event gives no list; under "time" it could even lie in test time."""
    raw = tmp_path / "raw"
    raw.mkdir()
    events = [*make_events(), Event("single", "1", 5, 1_000_000_000 + 300 * DAY_S)]
    for protocol in ("user", "time"):
        data = {**amazon_2018_ratings(raw, events), "raw_dir": str(raw), "protocol": protocol}
        store = prepared(tmp_path / "run", data)
        adds_up(store)
        assert "single" not in store.read("users")["raw_id"].to_pylist()
        assert report_of(store)["filtered"] == {"too few events of the user or item": 1}


def test_a_split_without_lists_is_said_before_any_model_runs(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    events = make_events()
    rows, _ = logged_rows(events)
    pq.write_table(
        pa.Table.from_pylist([row | {"split": "train"} for row in rows]), tmp_path / "lists.parquet"
    )
    logged = {"file": str(tmp_path / "lists.parquet"), "split": "split"}
    with pytest.raises(UserError, match="no list for test"):
        prepared(tmp_path / "run", {**ml_1m(raw, events), "raw_dir": str(raw)}, logged=logged)


def test_an_empty_items_file_is_no_crash(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    data = own_csv(raw, make_events())
    (raw / "i.csv").write_text("item_id,title\n")
    store = prepared(tmp_path / "run", {**data, "raw_dir": str(raw)})
    assert report_of(store)["untitled_items"] == store.read("items").num_rows
    ml = tmp_path / "ml"
    ml.mkdir()
    ml_latest(ml, make_events())
    (ml / "movies.csv").write_text("movieId,title,genres\n")
    with pytest.raises(UserError, match="unknown item"):
        prepared(tmp_path / "run-2", {"dataset": "movielens", "raw_dir": str(ml)})


def test_a_killed_run_s_leftovers_do_no_harm(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    leftover = tmp_path / "run/data/work-dead/events"
    leftover.mkdir(parents=True)
    (leftover / "00000000000000000000.arrow").write_bytes(b"half a file")
    store = prepared(tmp_path / "run", {**ml_1m(raw, make_events()), "raw_dir": str(raw)})
    adds_up(store)
    assert not list((tmp_path / "run/data").glob("work-*"))


def test_a_catalogue_too_small_for_a_list_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    with pytest.raises(UserError, match=r"data\.num_candidates = 60"):
        prepared(tmp_path / "run", {**ml_1m(raw, make_events()), "raw_dir": str(raw), "num_candidates": 60})
    assert not list((tmp_path / "run/data").glob("work-*"))


def test_some_users_are_the_same_users_whatever_the_file(tmp_path: Path) -> None:
    """max_users takes users by key: a random sample that neither their order nor other files change."""
    raw = tmp_path / "raw"
    raw.mkdir()
    events = make_events()
    found = []
    for order in (events, events[::-1]):
        data = amazon_2018_ratings(raw, order)
        store = prepared(tmp_path / "run", {**data, "raw_dir": str(raw), "max_users": 12})
        adds_up(store)
        found.append(store.read("users")["raw_id"].to_pylist())
        assert store.read("items").num_rows == len({e.item for e in events})
    assert found[0] == found[1] and len(found[0]) == 12


def logged_rows(events: list[Event]) -> tuple[list[dict[str, Any]], dict[str, list[Event]]]:
    """Per user one list from the third-last and one from the last event on, each with three items never met."""
    rows = []
    histories = ordered(events, "user")
    for user, own in histories.items():
        strange = [str(i) for i in range(1, NUM_ITEMS + 1) if str(i) not in {e.item for e in own}][:3]
        for block in (own[-3:-1], own[-1:]):
            rows.append(
                {
                    "user_id": user,
                    "candidate_item_ids": [*strange, *(e.item for e in block)],
                    "labels": [0.0] * 3 + [1.0] * len(block),
                    "shown_at": block[0].timestamp_s,
                }
            )
    return rows, histories


@pytest.mark.parametrize("timed", [True, False])
def test_logged_lists_take_the_place_of_drawn_ones(tmp_path: Path, timed: bool) -> None:
    """Candidates and labels stay as logged; the LLM sees the latest events before the user's first list."""
    raw = tmp_path / "raw"
    raw.mkdir()
    events = make_events()
    rows, histories = logged_rows(events)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "lists.parquet")
    logged = {"file": str(tmp_path / "lists.parquet"), "timestamp": "shown_at" if timed else ""}
    data = {**ml_1m(raw, events), "raw_dir": str(raw)}
    store = prepared(tmp_path / "run", data, logged=logged)
    adds_up(store)
    names = raw_ids(store)
    users = {row["raw_id"]: row for row in store.read("users").to_pylist()}
    assert set(users) == set(histories)
    raw_of = {row["user_id"]: raw_id for raw_id, row in users.items()}
    made: dict[str, list[list[str]]] = {}
    for row in store.read("lists").to_pylist():
        user = raw_of[row["user_id"]]
        made.setdefault(user, []).append([names[i] for i in row["candidate_item_ids"]])
        own = histories[user]
        if timed:
            place = next(p for p, e in enumerate(own) if e.timestamp_s == row["timestamp_s"])
            assert [names[i] for i in row["history_item_ids"]] == [
                e.item for e in own[max(0, place - 5) : place]
            ]
        assert row["split"] == users[user]["split"]
        assert row["labels"] == [0.0] * 3 + [1.0] * (len(row["labels"]) - 3)
    for user, own in histories.items():
        expected = [row["candidate_item_ids"] for row in rows if row["user_id"] == user]
        assert sorted(made[user]) == sorted(expected)
        assert [names[i] for i in users[user]["history_item_ids"]] == [e.item for e in own[:-3]][-6:]


def test_logged_lists_without_events_or_splits(tmp_path: Path) -> None:
    """A user may have lists and no event, a list an item that no file names; splits in the log are kept."""
    raw = tmp_path / "raw"
    raw.mkdir()
    events = make_events()
    rows, _ = logged_rows(events)
    for number, row in enumerate(rows):
        row |= {"split": "test" if number % 10 >= 8 else "train", "seen": ["3", "4"]}
    rows.append(
        {
            "user_id": "stranger",
            "candidate_item_ids": ["new-1", "1"],
            "labels": [0.0, 1.0],
            "shown_at": 0,
            "split": "train",
            "seen": None,
        }
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "lists.parquet")
    logged = {"file": str(tmp_path / "lists.parquet"), "split": "split", "history": "seen"}
    store = prepared(tmp_path / "run", {**ml_1m(raw, events), "raw_dir": str(raw)}, logged=logged)
    names = raw_ids(store)
    users = {row["raw_id"]: row for row in store.read("users").to_pylist()}
    assert users["stranger"]["history_item_ids"] == []
    titles = dict(zip(*(store.read("items")[name].to_pylist() for name in ("raw_id", "title")), strict=True))
    assert titles["new-1"] == "item new-1"
    found = store.read("lists").to_pylist()
    assert len(found) == len(rows)
    for row in found:
        if row["user_id"] != users["stranger"]["user_id"]:
            assert [names[i] for i in row["history_item_ids"]] == ["3", "4"]
            assert row["history_ratings"] == [0.0, 0.0]
    by_split = Counter(row["split"] for row in found)
    assert by_split["test"] == sum(row["split"] == "test" for row in rows)
    assert by_split["valid"] > 0
    assert {row["split"] for row in users.values()} == {"train", "valid", "test"}


@pytest.mark.skipif(not SHARED.exists(), reason="the real data sets are not here")
def test_gift_cards(tmp_path: Path) -> None:
    """The real files: 2,972 reviews, titles joined from the meta file."""
    raw = str(SHARED / "amazon-gift-cards")
    store = prepared(
        tmp_path / "run", {"dataset": "amazon2018", "raw_dir": raw, "positive_rating": 5, "max_history": 15}
    )
    adds_up(store)
    report = report_of(store)
    assert report["rows_read"] == 2972
    titles = dict(zip(*(store.read("items")[name].to_pylist() for name in ("raw_id", "title")), strict=True))
    assert titles["B004LLIKVU"] == "Amazon eGift Card"
    assert report["untitled_items"] < 0.05 * report["items"]
