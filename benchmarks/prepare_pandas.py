"""The steps of the stage `prepare` in one process with pandas: the peer that our benchmark measures against.

    python benchmarks/prepare_pandas.py RAW_FOLDER OUT_FOLDER [--user-core 60] [--item-core 40] [--history 15] [--seed 0]

RAW_FOLDER holds the Amazon reviews of 2018 (<Category>.json.gz, or <Category>.csv with ratings only) and perhaps
meta_<Category>.json.gz. Prints one JSON line. Written as pandas is commonly written; it takes nothing from the package and
does a little less: no checks of damaged lines, no attributes, no report.
"""

from __future__ import annotations

import argparse
import html
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd

EVENT_COLUMNS = {"reviewerID": "user", "asin": "item", "overall": "rating", "unixReviewTime": "timestamp_s"}
CHUNK_ROWS = 200_000
BLOCK, NUM_CANDIDATES, LIST_HISTORY = 4, 10, 5  # items met per list, candidates per list, events before it
MIN_POSITIVE = 5  # stars
TEST_FRAC, VALID_FRAC = 0.1, 0.1  # of all users; of the others


def prepare(
    raw: Path, out: Path, *, user_core: int = 60, item_core: int = 40, history: int = 15, seed: int = 0
) -> dict[str, float | int]:
    """Write users, items and lists as Parquet into `out`; return seconds and numbers of rows."""
    started = time.perf_counter()
    events = read_events(raw)
    num_rows = len(events)
    events = core(without_repeats(events), user_core, item_core)

    events["item_id"], item_names = pd.factorize(events["item"], sort=True)
    events["user_id"], user_names = pd.factorize(events["user"], sort=True)
    events = events.drop(columns=["user", "item"])
    # by time within a user; sorted by time already, and a stable sort keeps that
    events = events.sort_values("user_id", kind="stable").reset_index(drop=True)
    num_known = np.minimum((events.groupby("user_id")["item_id"].transform("size") + 1) // 2, history)
    place = events.groupby("user_id").cumcount()

    rng = np.random.default_rng(seed)
    users = user_table(events[place < num_known], user_names, rng)
    items = item_table(raw, item_names)
    lists = list_table(events, place, num_known, len(items), rng)
    lists.insert(2, "split", users["split"].to_numpy()[lists["user_id"]])

    out.mkdir(parents=True, exist_ok=True)
    for name, table in (("users", users), ("items", items), ("lists", lists)):
        table.to_parquet(out / f"{name}.parquet", index=False)
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "rows": num_rows,
        "users": len(users),
        "items": len(items),
        "events": len(events),
        "lists": len(lists),
    }


def read_events(raw: Path) -> pd.DataFrame:
    """user, item (categories), rating and timestamp_s of every review, in file order."""
    reviews = [path for path in sorted(raw.glob("*.json.gz")) if not path.name.startswith("meta_")]
    ratings = sorted(raw.glob("*.csv"))
    if len(reviews) + len(ratings) != 1:
        raise SystemExit(
            f"{raw}: want one <Category>.json.gz or <Category>.csv, found {len(reviews + ratings)}"
        )
    types = {"user": "str", "item": "str", "rating": "float32", "timestamp_s": "int64"}
    if ratings:
        events = pd.read_csv(ratings[0], names=["item", "user", "rating", "timestamp_s"], dtype=types)
    else:
        chunks = pd.read_json(reviews[0], lines=True, chunksize=CHUNK_ROWS, dtype=False)
        events = pd.concat([chunk[list(EVENT_COLUMNS)] for chunk in chunks], ignore_index=True)
        events = events.rename(columns=EVENT_COLUMNS).astype(types)
    return events.astype({"user": "category", "item": "category"})


def without_repeats(events: pd.DataFrame) -> pd.DataFrame:
    """The earliest review of each user and item, in order of time; at equal times the first in the file."""
    return events.sort_values("timestamp_s", kind="stable").drop_duplicates(["user", "item"])


def core(events: pd.DataFrame, user_core: int, item_core: int) -> pd.DataFrame:
    """Drop users and items with too few events until none is left."""
    while True:
        before = len(events)
        for name, least in (("user", user_core), ("item", item_core)):
            counts = events[name].value_counts()
            events = events[events[name].map(counts).astype("int64") >= least]
        if len(events) == before:
            return events.copy()


def user_table(known: pd.DataFrame, names: pd.Index, rng: np.random.Generator) -> pd.DataFrame:
    """One row per user: the history that the LLM may see, and a split drawn at random."""
    num_users = len(names)
    num_test = round(TEST_FRAC * num_users)
    num_valid = round(VALID_FRAC * (num_users - num_test))
    split = np.full(num_users, "train", dtype=object)
    order = rng.permutation(num_users)
    split[order[:num_test]] = "test"
    split[order[num_test : num_test + num_valid]] = "valid"
    histories = known.groupby("user_id").agg(
        history_item_ids=("item_id", list), history_ratings=("rating", list)
    )
    users = pd.DataFrame({"user_id": np.arange(num_users), "raw_id": names.astype("str"), "split": split})
    return users.join(histories, on="user_id")


def item_table(raw: Path, names: pd.Index) -> pd.DataFrame:
    """One row per item with its title; an item without one goes by its id."""
    items = pd.DataFrame({"item_id": np.arange(len(names)), "raw_id": names.astype("str")})
    parts = []
    for path in sorted(raw.glob("meta_*.json.gz")):
        for chunk in pd.read_json(path, lines=True, chunksize=CHUNK_ROWS, dtype=False):
            parts.append(chunk.loc[chunk["asin"].isin(items["raw_id"]), ["asin", "title"]])
    titles = pd.concat(parts) if parts else pd.DataFrame({"asin": [], "title": []}, dtype="str")
    titles = titles.drop_duplicates("asin")
    script = titles["title"].str.contains("getTime()", regex=False)
    text = titles["title"].str.replace(r"</?\w[^>]*>", " ", regex=True).map(html.unescape)
    titles["title"] = text.str.replace(r"\s+", " ", regex=True).str.strip().mask(script, "")
    items = items.merge(titles, how="left", left_on="raw_id", right_on="asin").drop(columns="asin")
    items["title"] = items["title"].where(items["title"].fillna("") != "", items["raw_id"])
    return items


def list_table(
    events: pd.DataFrame, place: pd.Series, num_known: pd.Series, num_items: int, rng: np.random.Generator
) -> pd.DataFrame:
    """One row per candidate list: the items of a block, and items drawn at random, shuffled."""
    later = events[place >= num_known].copy()
    later["place"] = (place - num_known)[later.index] % BLOCK
    later["list_id"] = (later["place"] == 0).cumsum() - 1
    first = later[later["place"] == 0]

    met = np.zeros((len(first), NUM_CANDIDATES), dtype=bool)
    candidates = np.zeros((len(first), NUM_CANDIDATES), dtype=np.int64)
    labels = np.zeros((len(first), NUM_CANDIDATES), dtype=np.float32)
    met[later["list_id"], later["place"]] = True
    candidates[later["list_id"], later["place"]] = later["item_id"]
    labels[later["list_id"], later["place"]] = later["rating"] >= MIN_POSITIVE
    rows = np.arange(len(first))
    while len(rows):  # draw again where an item is in a list twice
        drawn = rng.integers(num_items, size=(len(rows), NUM_CANDIDATES))
        candidates[rows] = np.where(met[rows], candidates[rows], drawn)
        in_order = np.sort(candidates[rows], axis=1)
        rows = rows[(in_order[:, 1:] == in_order[:, :-1]).any(axis=1)]
    shuffled = rng.permuted(np.tile(np.arange(NUM_CANDIDATES), (len(first), 1)), axis=1)
    candidates = np.take_along_axis(candidates, shuffled, axis=1)
    labels = np.take_along_axis(labels, shuffled, axis=1)

    # rows of the events just before each list's first one, of the same user
    spans = [
        (end - min(LIST_HISTORY, seen), end)
        for end, seen in zip(first.index, place[first.index], strict=True)
    ]
    item_ids, ratings = events["item_id"].to_numpy(), events["rating"].to_numpy()
    return pd.DataFrame(
        {
            "list_id": np.arange(len(first)),
            "user_id": first["user_id"].to_numpy(),
            "timestamp_s": first["timestamp_s"].to_numpy(),
            "history_item_ids": [item_ids[low:high] for low, high in spans],
            "history_ratings": [ratings[low:high] for low, high in spans],
            "candidate_item_ids": list(candidates),
            "labels": list(labels),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Prepare Amazon reviews of 2018 with pandas, in one process."
    )
    parser.add_argument("raw", type=Path, metavar="RAW_FOLDER")
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER")
    parser.add_argument("--user-core", type=int, default=60)
    parser.add_argument("--item-core", type=int, default=40)
    parser.add_argument("--history", type=int, default=15, help="most events of a user that the LLM sees")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    print(json.dumps(prepare(options.pop("raw"), options.pop("out"), **options)))


if __name__ == "__main__":
    main()
