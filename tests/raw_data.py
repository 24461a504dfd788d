"""Events that a test knows, written as each source that can be read, and the prepare stage on them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo4rec_ray.config import Config
from dpo4rec_ray.stages import prepare
from dpo4rec_ray.store.artifacts import Manifest, RunDir

NUM_USERS, NUM_ITEMS, DAY_S = 40, 60, 86400


@dataclass(frozen=True)
class Event:
    user: str
    item: str
    rating: int
    timestamp_s: int


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
