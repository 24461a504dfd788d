from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dpo4rec_ray.core.intervals import paired_bootstrap
from dpo4rec_ray.evaluation.breakdown import breakdown, buckets
from tests.unit.evaluation.frames import ABOUT, DLCM, SIMPLE, frame, only, random_frame

BUCKETS = [
    ([1, 2, 3, 4, 5, 6], {"1-2": [0, 1], "3-4": [2, 3], "5-6": [4, 5]}),
    ([8, 30, 8, 8, 15, 9], {"8": [0, 2, 3], "9": [5], "15-30": [1, 4]}),  # the first cut holds half
    ([8, 8, 8, 8, 8, 20], {"8": [0, 1, 2, 3, 4], "20": [5]}),  # both cuts are 8
    ([7, 20, 20, 20, 20, 20], {"7-20": [0, 1, 2, 3, 4, 5]}),  # both cuts are 20, and nothing is above
    ([5, 5], {"5": [0, 1]}),
    ([0.25, np.nan, 123456.0, 1.26], {"0.2": [0], "1.3": [3], "123456": [2]}),
    ([np.nan, np.nan], {}),
]


@pytest.mark.parametrize(("values", "wanted"), BUCKETS)
def test_buckets_by_hand(values: list[float], wanted: dict[str, list[int]]) -> None:
    found = {
        label: np.flatnonzero(chosen).tolist() for label, chosen in buckets(*[np.array(values, float)] * 2)
    }
    assert found == wanted


def test_breakdown_by_hand() -> None:
    """History lengths 8 8 15 30: thirds {8, 8}, {15}, {30}; popularity 2 12.5 3.25 and none: one list each.

    Lists 10 and 11, base LLM: seeds .5 and .875, mean .6875; the backbone .375 and .5, mean .4375. One user: no interval.
    """
    rows = breakdown(frame(SIMPLE | DLCM), ABOUT.sample(frac=1, random_state=0), 200)
    places = [(row["by"], row["bucket"]) for row in rows if row["system"] == "random"]
    assert places == [
        ("history length", "8"), ("history length", "15"), ("history length", "30"),
        ("lists of the user", "1"), ("lists of the user", "2"),
        ("popularity", "2"), ("popularity", "3.2"), ("popularity", "12.5"),
    ]  # fmt: skip
    row = only(rows, by="history length", bucket="8", system="base-llm")
    assert (row["lists"], row["users"], row["seeds"]) == (2, 1, 2)
    assert (row["ndcg@5"], row["map_paper@5"]) == (0.6875, 0.34375)
    assert (row["ndcg@5 delta"], row["ndcg@5 ci95"]) == (0.25, [None, None])
    backbone = only(rows, by="history length", bucket="8", system="backbone")
    assert (backbone["ndcg@5"], backbone["ndcg@5 delta"], backbone["ndcg@5 ci95"]) == (0.4375, None, None)
    round1 = only(rows, by="popularity", bucket="3.2", system="dpo4rec-round1")  # list 12: .5 - .625
    assert (round1["lists"], round1["ndcg@5 delta"]) == (1, -0.125)
    assert only(rows, by="popularity", bucket="12.5", system="popularity")["ndcg@5"] == 0.25


def test_breakdown_against_the_bootstrap_per_list() -> None:
    """A bucket's values are those of its lists only, and the buckets hold every list once."""
    per_list = random_frame([*SIMPLE, ("prm", "backbone", 0), ("prm", "base-llm", 0), ("mir", "backbone", 0)])
    rng = np.random.default_rng(0)
    ids = np.unique(per_list["list_id"])
    about = pd.DataFrame(
        {"list_id": ids, "history_length": rng.integers(3, 40, len(ids)), "popularity": rng.random(len(ids))}
    )
    rows = [row for row in breakdown(per_list, about, 250) if row["by"] == "history length"]
    assert sum(row["lists"] for row in rows if row["system"] == "random") == 150
    for row in (row for row in rows if row["system"] == "base-llm"):
        low, high = map(int, row["bucket"].split("-"))
        inside = about[about["history_length"].between(low, high)]["list_id"]
        part = per_list[per_list["list_id"].isin(inside) & (per_list["backbone"] == "prm")]
        lists = part.pivot(index=["user_id", "list_id"], columns="system", values="ndcg@5").astype(float)
        assert (row["lists"], row["users"]) == (len(lists), part["user_id"].nunique())
        assert row["ndcg@5"] == pytest.approx(lists["base-llm"].mean())
        delta = (lists["base-llm"] - lists["backbone"]).to_numpy()
        wanted = paired_bootstrap(delta, lists.index.get_level_values("user_id").to_numpy(), 250)
        assert [row["ndcg@5 delta"], *row["ndcg@5 ci95"]] == pytest.approx(list(wanted[:3]), abs=1e-12)


def test_about_must_know_every_list_once() -> None:
    per_list = frame(SIMPLE | DLCM)
    with pytest.raises(ValueError, match="misses 1 of 4 lists, such as 13"):
        breakdown(per_list, ABOUT[:3], 100)
    with pytest.raises(ValueError, match="a list twice"):
        breakdown(per_list, pd.concat([ABOUT, ABOUT[:1]]), 100)
    with pytest.raises(ValueError, match="without a history_length"):
        breakdown(per_list, ABOUT.assign(history_length=[1, 2, 3, np.nan]), 100)
    none = breakdown(per_list, ABOUT.assign(popularity=np.nan), 100)
    assert {row["by"] for row in none} == {"history length", "lists of the user"}
