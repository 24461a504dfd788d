"""The prepare stage on real Ray: every source and protocol against a plain loop over events that the test knows."""

from __future__ import annotations

import csv
import functools
import gzip
import http.server
import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dpo4rec_ray.config import Config, read_config
from dpo4rec_ray.config.data import DataSection
from dpo4rec_ray.datasets.files import plan_splits
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.prepare import ingest
from dpo4rec_ray.prepare.partition_lists import list_number
from dpo4rec_ray.stages import prepare
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.store.reading import without_copies
from dpo4rec_ray.store.schemas import EVALUATED_AT, EVALUATED_METRICS
from dpo4rec_ray.studies import drift
from dpo4rec_ray.studies.study_parts import SeedRuns, by_name, measured
from tests.conftest import local_ray

pytestmark = pytest.mark.ray
NUM_USERS, NUM_ITEMS, DAY_S = 40, 60, 86400
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@dataclass(frozen=True)
class Event:
    user: str
    item: str
    rating: int
    timestamp_s: int


@pytest.fixture(scope="module", autouse=True)
def ray_local() -> Iterator[None]:
    with local_ray(2, store_mib=256):
        yield


def make_events(seed: int = 0) -> list[Event]:
    """Users of 6 to 24 events at distinct items over 200 days, several a day, in no order of time in the file."""
    rng = np.random.default_rng(seed)
    events = []
    for user in range(1, NUM_USERS + 1):
        size = int(rng.integers(6, 25))
        first = 1_000_000_000 + int(rng.integers(0, 200)) * DAY_S
        times = first + rng.integers(0, 20, size) * DAY_S + rng.integers(0, 40000, size)
        events += [
            Event(str(user), str(item + 1), int(rating), int(time))
            for item, rating, time in zip(
                rng.permutation(NUM_ITEMS)[:size], rng.integers(1, 6, size), times, strict=True
            )
        ]
    return [events[place] for place in rng.permutation(len(events))]


def lines(rows: list[str], file: Path, encoding: str = "utf-8") -> None:
    text = ("\n".join(rows) + "\n").encode(encoding)
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)


def ml_1m(folder: Path, events: list[Event]) -> dict[str, Any]:
    lines([f"{e.user}::{e.item}::{e.rating}::{e.timestamp_s}" for e in events], folder / "ratings.dat")
    lines([f"{i}::Film {i} (1990)::Drama" for i in range(1, NUM_ITEMS + 1)], folder / "movies.dat", "latin-1")
    lines([f"{u}::F::25::4::12345" for u in range(1, NUM_USERS + 1)], folder / "users.dat")
    return {"dataset": "movielens"}


def ml_100k(folder: Path, events: list[Event]) -> dict[str, Any]:
    lines([f"{e.user}\t{e.item}\t{e.rating}\t{e.timestamp_s}" for e in events], folder / "u.data")
    flags = "|".join(["0"] * 8 + ["1"] + ["0"] * 10)
    lines(
        [f"{i}|Film {i} (1990)|01-Jan-1990||http://x|{flags}" for i in range(1, NUM_ITEMS + 1)],
        folder / "u.item",
        "latin-1",
    )
    lines([f"{u}|24|M|technician|85711" for u in range(1, NUM_USERS + 1)], folder / "u.user")
    return {"dataset": "movielens"}


def ml_latest(folder: Path, events: list[Event]) -> dict[str, Any]:
    lines(
        [
            "userId,movieId,rating,timestamp",
            *(f"{e.user},{e.item},{e.rating}.0,{e.timestamp_s}" for e in events),
        ],
        folder / "ratings.csv",
    )
    lines(
        [
            "movieId,title,genres",
            *(f'{i},"Film, The {i} (1990)",Drama|Comedy' for i in range(1, NUM_ITEMS + 1)),
        ],
        folder / "movies.csv",
    )
    return {"dataset": "movielens"}


def amazon_2018(folder: Path, events: list[Event]) -> dict[str, Any]:
    rows = [
        json.dumps(
            {"overall": float(e.rating), "verified": True, "reviewerID": e.user, "asin": e.item, "style": {"a": "b"},
             "reviewText": 'He said "ok"', "unixReviewTime": e.timestamp_s}
        )
        for e in events
    ]  # fmt: skip
    lines(rows, folder / "Books_5.json.gz")
    meta = [
        json.dumps({"asin": str(i), "title": f"Book {i}", "category": ["Books", "Fiction"]})
        for i in range(5, 50)
    ]
    lines(meta, folder / "meta_Books.json.gz")
    return {"dataset": "amazon2018"}


def amazon_2018_ratings(folder: Path, events: list[Event]) -> dict[str, Any]:
    lines([f"{e.item},{e.user},{float(e.rating)},{e.timestamp_s}" for e in events], folder / "Books.csv")
    return {"dataset": "amazon2018"}


def amazon_2023(folder: Path, events: list[Event]) -> dict[str, Any]:
    rows = [
        json.dumps(
            {"rating": float(e.rating), "title": "t", "text": "x", "asin": "other", "parent_asin": e.item,
             "user_id": e.user, "timestamp": e.timestamp_s * 1000 + 7}
        )
        for e in events
    ]  # fmt: skip
    lines(rows, folder / "Books.jsonl.gz")
    meta = [
        json.dumps({"parent_asin": str(i), "title": f"Book {i}", "categories": ["Books"]})
        for i in range(1, 61)
    ]
    lines(meta, folder / "meta_Books.jsonl.gz")
    return {"dataset": "amazon2023"}


def own_parquet(folder: Path, events: list[Event]) -> dict[str, Any]:
    table = pa.table(
        {
            "who": [int(e.user) for e in events],
            "what": [e.item for e in events],
            "stars": [e.rating for e in events],
            "when": pa.array([e.timestamp_s for e in events], pa.timestamp("s")),
        }
    )
    (folder / "events").mkdir()
    half = len(table) // 2
    pq.write_table(table.slice(0, half), folder / "events" / "a.parquet", row_group_size=50)
    pq.write_table(table.slice(half), folder / "events" / "b.parquet")
    return {
        "dataset": "table",
        "table": {
            "interactions": "events/*.parquet",
            "user": "who",
            "item": "what",
            "rating": "stars",
            "timestamp": "when",
        },
    }


def own_csv(folder: Path, events: list[Event]) -> dict[str, Any]:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["timestamp", "item_id", "note", "user_id", "rating"])
    writer.writerows([e.timestamp_s, e.item, "a, b", e.user, e.rating] for e in events)
    (folder / "e.csv").write_text(out.getvalue())
    lines(["item_id,title", *(f"{i},Thing {i}" for i in range(1, NUM_ITEMS + 1))], folder / "i.csv")
    return {"dataset": "table", "table": {"interactions": "e.csv", "items": "i.csv"}}


def own_jsonl(folder: Path, events: list[Event]) -> dict[str, Any]:
    rows = [
        json.dumps(
            {"user_id": e.user, "item_id": e.item, "rating": e.rating, "timestamp": e.timestamp_s * 1000}
        )
        for e in events
    ]
    lines(rows, folder / "e.jsonl.gz")
    return {"dataset": "table", "table": {"interactions": "e.jsonl.gz", "timestamp_unit": "ms"}}


SOURCES: dict[str, Callable[[Path, list[Event]], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        ml_1m, ml_100k, ml_latest, amazon_2018, amazon_2018_ratings, amazon_2023, own_parquet, own_csv, own_jsonl,
    )
}  # fmt: skip


def prepared(folder: Path, data: dict[str, Any], **sections: Any) -> RunDir:
    """Run the stage and mark its artifacts complete."""
    table = data.pop("table", None)
    sections |= {"table": table} if table else {}
    values = {"max_history": 6, "test_frac": 0.2, "valid_frac": 0.2, "reranker_history": 5, **data}
    config = Config.model_validate({"data": values, **sections})
    store = RunDir(folder)
    outcome = prepare.run(config, store, 0)
    for name in prepare.ARTIFACTS:
        store.finish(Manifest(artifact=name, fingerprint="x", rows=outcome.rows[name], stats=outcome.stats))
    return store


def report_of(store: RunDir) -> dict[str, Any]:
    return json.loads((store.root / "data" / "report.json").read_text())


def windows_of(folder: Path, known: int, **data: Any) -> RunDir:
    """Three windows of test time, so many of them known."""
    values = {"protocol": "time", "test_frac": 0.5, "drift_windows": 3, "known_windows": known}
    return prepared(folder, {**data, **values})


def adds_up(store: RunDir) -> None:
    """No row is dropped in silence."""
    report = report_of(store)
    gone = sum(report["quarantined"].values()) + sum(report["filtered"].values())
    assert report["rows_read"] == report["rows_kept"] + gone


def ordered(events: list[Event], protocol: str) -> dict[str, list[Event]]:
    """Each user's events in the order of the protocol; sorted() is stable, so ties keep file order."""
    histories: dict[str, list[Event]] = {}
    for event in sorted(
        events, key=lambda e: e.timestamp_s // DAY_S if protocol == "paper" else e.timestamp_s
    ):
        histories.setdefault(event.user, []).append(event)
    return histories


def raw_ids(store: RunDir) -> list[str]:
    return store.read("items")["raw_id"].to_pylist()


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


def test_results_depend_on_neither_partitions_nor_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stream, one block, or many ranges of a plain file; one partition or several: the same artifacts."""
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
        store = prepared(tmp_path / f"run-{number}", data)
        adds_up(store)
        assert report_of(store)["filtered"]["repeated events"] > 100
        results.append({artifact: store.read(artifact) for artifact in prepare.ARTIFACTS})
        assert len(list(store.path("lists").glob("*.parquet"))) == (
            1 if partition_mib == 256 else 2 + (number == 2)
        )
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


def test_bad_lines_are_set_aside_with_their_numbers(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    events = make_events()
    ml_1m(raw, events)
    rows = (raw / "ratings.dat").read_text().splitlines()
    for first in (0, 60):
        rows[first + 9] = "1::5"
        rows[first + 19] = "1::5::many::978300000"
        rows[first + 29] = "1::5::9::978300000"
        rows[first + 39] = "1::999::3::978300000"
        rows[first + 49] = "777::5::3::978300000"
        rows[first + 59] = "1::5::3::-5"
    lines(rows, raw / "ratings.dat")
    data = {"dataset": "movielens", "raw_dir": str(raw)}
    with pytest.raises(UserError, match=r"ratings.dat line 10: wrong field count: '1::5'; 12 of"):
        prepared(tmp_path / "run", dict(data))
    assert (
        len((tmp_path / "run/data/quarantine/events.jsonl").read_text().splitlines()) == 12
    )  # also of a run that stops
    store = prepared(tmp_path / "run", {**data, "max_bad_fraction": 0.03})
    adds_up(store)
    found = [
        json.loads(line) for line in (tmp_path / "run/data/quarantine/events.jsonl").read_text().splitlines()
    ]
    assert {(line["line"], line["reason"]) for line in found} == {
        (first + line, reason)
        for first in (0, 60)
        for line, reason in (
            (10, "wrong field count"), (20, "bad number"), (30, "rating out of range"), (40, "unknown item"),
            (50, "unknown user"), (60, "impossible timestamp"),
        )
    }  # fmt: skip
    assert all(line["path"].endswith("ratings.dat") for line in found)


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


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and its address on a web server of this machine (without byte ranges, as Python's own)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_the_same_data_from_a_folder_a_uri_and_the_web(tmp_path: Path, web: tuple[Path, str]) -> None:
    """A path, file:// through pyarrow, http:// through fsspec: the workers read all three alike."""
    folder, address = web
    data = amazon_2018(folder, make_events())
    found = []
    for number, raw in enumerate((str(folder), folder.as_uri(), address)):
        store = prepared(tmp_path / f"run-{number}", {**data, "raw_dir": raw})
        adds_up(store)
        found.append({name: store.read(name) for name in prepare.ARTIFACTS})
    for name in prepare.ARTIFACTS:
        assert found[0][name].equals(found[1][name]) and found[0][name].equals(found[2][name])


def test_a_file_that_goes_away_or_breaks_off_is_one_line(tmp_path: Path, web: tuple[Path, str]) -> None:
    folder, address = web
    data = amazon_2018(folder, make_events())
    content = (folder / "Books_5.json.gz").read_bytes()
    (folder / "Books_5.json.gz").write_bytes(content[: len(content) // 2])
    for raw in (str(folder), address):
        with pytest.raises(UserError, match=r"Books_5.json.gz: cannot be read, or is truncated") as caught:
            prepared(tmp_path / "run", {**data, "raw_dir": raw})
        assert "Traceback" not in str(caught.value).split("\n")[0]
    (folder / "Books_5.json.gz").unlink()
    with pytest.raises(UserError, match="no file of interactions"):
        prepared(tmp_path / "run", {**data, "raw_dir": address})


@given(
    seed=st.integers(0, 2**32 - 1),
    source=st.sampled_from(
        ["ml_1m", "ml_latest", "amazon_2018", "amazon_2018_ratings", "amazon_2023", "own_csv", "own_jsonl"]
    ),
)
@settings(max_examples=25, deadline=None)
def test_mangled_files_lose_no_row(tmp_path_factory: pytest.TempPathFactory, seed: int, source: str) -> None:
    """Bytes of the interactions are changed, taken out and put in: every line is kept, quarantined or filtered."""
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("mangled")
    raw = folder / "raw"
    raw.mkdir()
    data = SOURCES[source](raw, make_events(seed))
    (file,) = [
        path for path in raw.iterdir()
        if path.name in ("ratings.dat", "ratings.csv", "Books_5.json.gz", "Books.csv", "Books.jsonl.gz", "e.csv", "e.jsonl.gz")
    ]  # fmt: skip
    packed = file.suffix == ".gz"
    content = bytearray(gzip.decompress(file.read_bytes()) if packed else file.read_bytes())
    header = content.index(b"\n") + 1 if source in ("ml_latest", "own_csv") else 0
    for place in rng.integers(header, len(content) - 1, 40).tolist():
        place = min(place, len(content) - 1)  # earlier changes may have taken out what was there
        change = rng.integers(4)
        if change == 0:
            content[place] = int(rng.integers(256))
        elif change == 1:
            del content[place : place + int(rng.integers(1, 30))]
        elif change == 2:
            content[place:place] = rng.bytes(int(rng.integers(1, 20)))
        else:
            content[place:place] = rng.choice(
                [b"\n", b"\n\n", b'"', b"\x00", b"::", b",", b"null", b"9" * 30, b"\r\n"]
            )
    if not content.endswith(b"\n"):
        content += b"\n"
    num_lines = bytes(content[header:]).replace(b"\r\n", b"\n").count(b"\n")
    file.write_bytes(gzip.compress(bytes(content)) if packed else bytes(content))
    store = prepared(folder / "run", {**data, "raw_dir": str(raw), "max_bad_fraction": 1.0})
    adds_up(store)
    assert report_of(store)["lines_read"] == num_lines
    # A line break that was put between quotes makes one row of two lines.
    assert report_of(store)["rows_read"] == num_lines or source == "own_csv"
    assert report_of(store)["rows_kept"] > 0


def test_windows_of_time(tmp_path: Path) -> None:
    """Lists of a window are the same however many windows are known; ID@WINDOW has the last events before the window."""
    raw = tmp_path / "raw"
    raw.mkdir()
    events = make_events()
    data = {
        **ml_1m(raw, events),
        "raw_dir": str(raw),
        "protocol": "time",
        "test_frac": 0.5,
        "drift_windows": 3,
    }
    expected = ordered(events, "time")
    late: list[
        list[tuple[int, str, int, list[int], list[float]]]
    ] = []  # time, user, number, candidates, labels
    for known in (0, 1, 2):
        store = windows_of(tmp_path / f"known{known}", known, **data)
        stats = store.require("lists").stats
        starts_s, names = stats["windows_s"], raw_ids(store)
        users = {row["user_id"]: row for row in store.read("users").to_pylist()}
        assert list(users) == list(range(len(users))) and len(users) == store.require("users").rows
        found: dict[int, dict[int, tuple[list[int], list[float]]]] = {user: {} for user in users}
        times_s: dict[int, list[int]] = {user: [] for user in users}
        splits: dict[int, set[str]] = {user: set() for user in users}
        for row in store.read("lists").to_pylist():
            user = row["user_id"]
            found[user][row["list_id"] - (user << 20)] = row["candidate_item_ids"], row["labels"]
            times_s[user].append(row["timestamp_s"])
            splits[user].add(row["split"])
            assert (row["split"] == "test") == (row["timestamp_s"] >= starts_s[known])
        own = {users[user]["raw_id"]: user for user in users if user < stats["refreshed_from"]}
        assert sorted(own) == sorted(expected)
        late.append(
            sorted(
                (time_s, raw_id, number, *one)
                for raw_id, user in own.items()
                for time_s, (number, one) in zip(times_s[user], found[user].items(), strict=True)
            )
        )
        again = {
            user: row["raw_id"].rsplit("@", 1) for user, row in users.items() if user not in own.values()
        }
        assert {int(window) for _, window in again.values()} == set(range(known, 3))
        for user, (raw_id, window) in again.items():
            start_s, theirs = starts_s[int(window)], found[own[raw_id]]
            before = [event.item for event in expected[raw_id] if event.timestamp_s < start_s]
            shown = [names[item] for item in users[user]["history_item_ids"]]
            assert shown == before[-6:] and shown
            assert splits[user] == {"test"} and min(times_s[user]) >= start_s
            assert found[user] and all(theirs[number] == one for number, one in found[user].items())
            assert len(found[user]) == sum(time_s >= start_s for time_s in times_s[own[raw_id]])
        known_before = [raw_id for raw_id in expected if expected[raw_id][0].timestamp_s < starts_s[known]]
        assert {raw_id for raw_id, window in again.values() if int(window) == known} <= set(known_before)
    # What was tested with fewer windows known is the same list with more of them.
    for known, window in ((1, 1), (1, 2), (2, 2)):
        since = [[one for one in lists if one[0] >= starts_s[window]] for lists in (late[0], late[known])]
        assert since[0] == since[1] and since[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"drift_windows": 2}, 'drift_windows = 2 needs protocol = "time"'),
        ({"protocol": "time", "drift_windows": 2, "known_windows": 2}, "known_windows = 2 leaves none"),
    ],
)
def test_windows_that_cannot_be(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataSection(**keys)  # pyright: ignore[reportArgumentType]


def evaluated_windows(folder: Path, events: list[Event]) -> SeedRuns:
    """Runs that know 0, 1 and 2 windows, with made figures: texts add .4, less .1 for each window that they are old, and .02
    more with the reranker of each later window.
    """
    raw = folder / "raw"
    raw.mkdir()
    data = {**ml_1m(raw, events), "raw_dir": str(raw)}
    stores = [windows_of(folder / f"known{known}", known, **data) for known in range(3)]
    for known, store in enumerate(stores):
        starts_s, users = store.require("lists").stats["windows_s"], store.read("users")
        names = dict(zip(users["user_id"].to_pylist(), users["raw_id"].to_pylist(), strict=True))
        rows = []
        for one in store.read("lists", split="test").to_pylist():
            window = int(np.searchsorted(starts_s, one["timestamp_s"], side="right")) - 1
            _, copy, written = names[one["user_id"]].rpartition("@")
            hard = list_number(one["list_id"]) % 7 / 100  # the same in all runs
            added = 0.4 - 0.1 * (window - int(written)) + 0.02 * known if copy else 0.9
            for system, value in (("backbone", hard), ("statistics", hard + added)):
                same = {f"{metric}@{k}": value for metric in EVALUATED_METRICS for k in EVALUATED_AT}
                ids = {"list_id": one["list_id"], "user_id": one["user_id"]}
                rows.append({**ids, "system": system, "backbone": "prm", "seed": 0, **same})
        store.start("per_list")
        store.write("per_list", pa.Table.from_pylist(rows))
        stats = {"last_round": 0, "test_lists": "same"}
        store.finish(Manifest(artifact="per_list", fingerprint="x", rows=len(rows), stats=stats))
        recipe = {
            "data": {"drift_windows": 3, "protocol": "time", "known_windows": known},
            "llm": {"source": "statistics"},
        }
        (store.root / "config.json").write_text(Config.model_validate(recipe).model_dump_json())
        (store.root / "summary.json").write_text("{}")
    config = read_config(str(stores[0].root))
    return SeedRuns(0, config, stores[0], {f"cut {known}": stores[known] for known in (1, 2)})


def test_the_study_of_drift_pairs_lists_of_the_same_users(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    stay = [
        replace(event, timestamp_s=1_000_000_000 + int(rng.integers(200 * DAY_S))) for event in make_events()
    ]
    runs = evaluated_windows(tmp_path, stay)
    rows = by_name(drift.rows([runs]))
    expected = {  # what texts add, and against nothing refreshed
        "nothing refreshed, window 0": (0.4, 0.0),
        "nothing refreshed, window 1": (0.3, 0.0),
        "texts refreshed, window 1": (0.4, 0.1),
        "all refreshed, window 1": (0.42, 0.12),
        "nothing refreshed, window 2": (0.2, 0.0),
        "texts refreshed, window 2": (0.4, 0.2),
        "all refreshed, window 2": (0.44, 0.24),
    }
    for name, (added, back) in expected.items():
        assert measured(rows[name], drift.ADDED).interval.mean == pytest.approx(added, abs=1e-5), name
        assert measured(rows[name], drift.BACK).interval.mean == pytest.approx(back, abs=1e-5), name
    assert rows.keys() == expected.keys() | {
        f"{kind} refreshed, all later windows" for kind in ("nothing", "texts", "all")
    }
    lists = {name: row[drift.LISTS] for name, row in rows.items()}
    assert (
        lists["all refreshed, all later windows"]
        == lists["all refreshed, window 1"] + lists["all refreshed, window 2"]
    )
    told = drift.sentence(list(rows.values()))
    assert "texts add +0.4000" in told and "; all +0." in told
    store = runs.recipe
    own = without_copies(store, store.read("per_list").to_pandas())["user_id"]
    assert own.max() < store.require("lists").stats["refreshed_from"] < store.require("users").rows


def test_windows_into_which_nobody_comes_back(tmp_path: Path) -> None:
    """Users stay for 20 of 200 days."""
    with pytest.raises(
        UserError, match=r"no user with events before the cut has a list in window 1, 2; use fewer windows"
    ):
        drift.rows([evaluated_windows(tmp_path, make_events())])
