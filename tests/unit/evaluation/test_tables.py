from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dpo4rec_ray.core.intervals import paired_bootstrap
from dpo4rec_ray.core.metrics import METRICS
from dpo4rec_ray.evaluation.paper_table import (
    HEADLINE,
    TABLE_I,
    escape,
    key_of,
    layout,
    to_csv,
    to_latex,
    to_markdown,
)
from dpo4rec_ray.evaluation.tables import (
    METRIC_NAMES,
    breakdown,
    buckets,
    comparisons,
    printed,
    seed_rows,
    summarise,
    systems_table,
    write_tables,
)

Fits = dict[tuple[str, str, int], list[float]]

# Lists 10 and 11 are user 1's, 12 user 2's, 13 user 3's; list 13 has no positive. Eighths are exact in float32.
LISTS, USERS = [10, 11, 12, 13], [1, 1, 2, 3]
SIMPLE: Fits = {
    ("none", "random", 0): [0.25, 0.25, 0.0, 0.0],
    ("none", "popularity", 0): [0.5, 0.25, 0.25, 0.0],
    ("none", "upper-bound", 0): [1.0, 1.0, 1.0, 0.0],
}
DLCM: Fits = {
    ("dlcm", "backbone", 0): [0.5, 0.25, 0.5, 0.0],
    ("dlcm", "backbone", 1): [0.5, 0.5, 0.75, 0.0],
    ("dlcm", "base-llm", 0): [0.75, 0.25, 0.5, 0.0],
    ("dlcm", "base-llm", 1): [0.75, 1.0, 0.75, 0.0],
    ("dlcm", "dpo4rec-round1", 0): [1.0, 0.5, 0.5, 0.0],
    ("dlcm", "dpo4rec-round1", 1): [1.0, 1.0, 0.5, 0.0],
}
ABOUT = pd.DataFrame(
    {"list_id": LISTS, "history_length": [8, 8, 15, 30], "popularity": [2.0, 12.5, 3.25, np.nan]}
)


def frame(fits: Fits, lists: list[int] = LISTS, users: list[int] = USERS) -> pd.DataFrame:
    """per_list in an arbitrary row order: every metric has the value given, map_paper half of it."""
    parts: list[pd.DataFrame] = []
    for (backbone, system, seed), values in fits.items():
        part = pd.DataFrame({"list_id": lists, "user_id": users})
        part["system"], part["backbone"], part["seed"] = system, backbone, np.int32(seed)
        scale = [0.5 if name.startswith("map_paper") else 1.0 for name in METRIC_NAMES]
        part[list(METRIC_NAMES)] = np.outer(values, scale).astype(np.float32)
        parts.append(part)
    return pd.concat(parts).sample(frac=1.0, random_state=3, ignore_index=True)


def random_frame(
    systems: list[tuple[str, str, int]], num_lists: int = 150, num_users: int = 25
) -> pd.DataFrame:
    """Every metric its own random figure, users with 1 to many lists."""
    rng = np.random.default_rng(11)
    users = np.r_[np.arange(num_users), rng.integers(0, num_users, num_lists - num_users) ** 2 // num_users]
    parts: list[pd.DataFrame] = []
    for backbone, system, seed in systems:
        part = pd.DataFrame(
            rng.random((num_lists, len(METRIC_NAMES))).astype(np.float32), columns=METRIC_NAMES
        )
        part.insert(0, "list_id", np.arange(num_lists) * 7 % num_lists + 1000)
        part.insert(1, "user_id", users)
        part["system"], part["backbone"], part["seed"] = system, backbone, seed
        parts.append(part)
    return pd.concat(parts).sample(frac=1.0, random_state=5, ignore_index=True)


def only(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row with these values."""
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]


def test_every_metric_of_the_registry_is_evaluated() -> None:
    assert {name.partition("@")[0] for name in METRIC_NAMES} == set(METRICS)
    assert set(HEADLINE) <= set(METRIC_NAMES)


def test_seed_rows_by_hand() -> None:
    """DLCM, seed 1: .5 .5 .75 0. Over lists 1.75 / 4; users .5, .75, 0: 1.25 / 3; three lists with a positive: 1.75 / 3."""
    rows = seed_rows(frame(SIMPLE | DLCM))
    assert len(rows) == 9
    row = only(rows, backbone="dlcm", system="backbone", seed=1)
    assert row["num_lists"] == 4
    assert row["ndcg@5"] == row["hr@10"] == 0.4375
    assert row["map_paper@5"] == 0.21875
    assert row["ndcg@5 by user"] == pytest.approx(1.25 / 3)
    assert row["map_paper@5 by user"] == pytest.approx(1.25 / 6)
    assert row["ndcg@5 on lists with a positive"] == pytest.approx(1.75 / 3)
    assert row["map@5 on lists with a positive"] == pytest.approx(1.75 / 3)
    ceiling = only(rows, system="upper-bound")
    assert (ceiling["ndcg@5"], ceiling["ndcg@5 on lists with a positive"]) == (0.75, 1.0)
    assert set(METRIC_NAMES) < set(row)


def test_no_list_with_a_positive_has_no_mean_over_them() -> None:
    fits: Fits = {fit: [0.0] * 4 for fit in SIMPLE}
    table = systems_table(seed_rows(frame(fits)))
    assert [row["ndcg@5"] for row in table] == [0.0] * 3
    assert {row["ndcg@5 on lists with a positive"] for row in table} == {None}


def test_what_cannot_be_compared_is_refused() -> None:
    good = frame(SIMPLE | DLCM)
    with pytest.raises(ValueError, match="no rows"):
        seed_rows(good[:0])
    with pytest.raises(ValueError, match="one list twice"):
        seed_rows(pd.concat([good[good["backbone"] == "dlcm"], good]))
    random = good[good["system"] == "random"]
    with pytest.raises(ValueError, match=r"'none', 'random', .* not measured on the lists of the other fits"):
        comparisons(good.drop(random.index[0]))
    with pytest.raises(ValueError, match="not measured on the lists"):
        comparisons(good.assign(user_id=np.where(good["system"] == "random", 9, good["user_id"])))
    with pytest.raises(ValueError, match="no rows of upper-bound"):
        seed_rows(good[good["system"] != "upper-bound"])
    with pytest.raises(ValueError, match="not finite"):
        comparisons(good.assign(**{"hr@3": np.where(good["seed"] == 1, np.nan, 0.0)}))


def test_systems_table_by_hand() -> None:
    """Base LLM: seed means 1.5 / 4 = .375 and 2.5 / 4 = .625: mean .5, deviation .125 * sqrt(2)."""
    table = systems_table(seed_rows(frame(SIMPLE | DLCM)))
    row = only(table, system="base-llm")
    assert (row["seeds"], row["lists"], row["ndcg@5"]) == (2, 4, 0.5)
    assert row["ndcg@5 sd"] == pytest.approx(0.125 * math.sqrt(2))
    assert row["map_paper@5 by user sd"] == pytest.approx(
        abs((0.5 + 0.5) - (0.875 + 0.75)) / 6 / math.sqrt(2)
    )
    popularity = only(table, system="popularity")
    assert (popularity["seeds"], popularity["ndcg@5"], popularity["ndcg@5 sd"]) == (1, 0.25, None)


def test_order_of_the_table() -> None:
    """Backbones in the paper's order, then ours, then unknown ones by name; rounds by number."""
    systems = ["dpo4rec-round10", "dpo4rec-round2", "statistics", "backbone"]
    fits: Fits = {
        (backbone, system, 0): [0.5] * 4 for backbone in ("own", "mir", "setrank", "a") for system in systems
    }
    fits |= {("prm", "base-llm", 0): [0.5] * 4}
    rows = seed_rows(frame(SIMPLE | fits))
    inner = [systems[3], systems[2], systems[1], systems[0]]
    wanted = [("none", "random"), ("none", "popularity"), ("prm", "base-llm")]
    wanted += [(backbone, system) for backbone in ("setrank", "mir", "a", "own") for system in inner]
    wanted += [("none", "upper-bound")]
    assert [(row["backbone"], row["system"]) for row in systems_table(rows[::-1])] == wanted
    assert [(row["backbone"], row["system"]) for row in rows] == wanted


def test_comparisons_by_hand() -> None:
    """Base LLM minus backbone, seed 0: .25 0 0 0; seed 1: .25 .5 0 0. Seed means .0625 and .1875, deviation .125/sqrt(2).

    Averaged over seeds: .25 .25 0 0, mean .125. Users: 1 has sum .5 of 2 lists, 2 and 3 have 0 of 1. Resamples of three
    users run from 0 (no user 1, chance 8/27) to .25 (user 1 alone, chance 1/27): 2.5 % and 97.5 % are these two.
    """
    rows = comparisons(frame(SIMPLE | DLCM), 4000)
    pairs = [(row["system"], row["against"]) for row in rows if row["metric"] == "ndcg@5"]
    assert pairs == [
        ("backbone", "popularity"),
        ("base-llm", "backbone"),
        ("dpo4rec-round1", "backbone"),
        ("dpo4rec-round1", "base-llm"),
    ]
    assert len(rows) == 4 * len(METRIC_NAMES)
    row = only(rows, system="base-llm", against="backbone", metric="ndcg@5")
    assert (row["backbone"], row["seeds"], row["delta"]) == ("dlcm", 2, 0.125)
    assert row["delta sd"] == pytest.approx(0.125 / math.sqrt(2))
    assert row["ci95"] == pytest.approx([0.0, 0.25])
    assert row["p_value"] == pytest.approx(2 * 8 / 27, abs=0.05)  # resamples at 0 count on that side
    # by user: .25 for user 1, 0 for the others
    assert row["by user delta"] == pytest.approx(0.25 / 3)
    assert row["by user ci95"] == pytest.approx([0.0, 0.25])
    half = only(rows, system="base-llm", against="backbone", metric="map_paper@5")
    assert (half["delta"], half["ci95"]) == (0.0625, pytest.approx([0.0, 0.125]))
    # popularity has one seed, which meets both of the backbone's: (0 0 .25 0) and (0 .25 .5 0), means .0625 and .1875
    alone = only(rows, system="backbone", against="popularity", metric="ndcg@5")
    assert (alone["delta"], alone["seeds"]) == (0.125, 2)
    assert alone["delta sd"] == pytest.approx(0.125 / math.sqrt(2))


def test_a_loss_is_judged_as_the_same_gain() -> None:
    """Systems exchanged: the difference and its interval change sign, the p-value stays."""
    names = {"backbone": "base-llm", "base-llm": "backbone"}
    exchanged = {
        (backbone, names.get(system, system), seed): row for (backbone, system, seed), row in DLCM.items()
    }
    gain, loss = (
        only(comparisons(frame(SIMPLE | fits), 500), system="base-llm", metric="ndcg@5")
        for fits in (DLCM, exchanged)
    )
    assert (loss["delta"], loss["ci95"]) == (-gain["delta"], [-gain["ci95"][1], -gain["ci95"][0]])
    assert loss["p_value"] == gain["p_value"] > 0.5


@pytest.mark.parametrize("room", [4_000_000, 100])
def test_comparisons_against_the_bootstrap_per_list(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per pair: join on (list, seed), average over the seeds list by list, `paired_bootstrap` on the lists by user.

    The round lacks seed 1, the base knowledge seed 2: each pair meets on the seeds that both have. Also where the resamples
    do not fit in memory at once.
    """
    monkeypatch.setattr("dpo4rec_ray.core.intervals._MAX_COUNTS_IN_MEMORY", room)
    seeds = {"backbone": (0, 1, 2), "statistics": (0, 1), "dpo4rec-round1": (0, 2)}
    fits = [
        (backbone, system, seed)
        for backbone in ("prm", "mir")
        for system, own in seeds.items()
        for seed in own
    ]
    per_list = random_frame([*SIMPLE, *fits])
    common = {
        ("backbone", "popularity"): 3,
        ("statistics", "backbone"): 2,
        ("dpo4rec-round1", "backbone"): 2,
        ("dpo4rec-round1", "statistics"): 1,
    }
    rows = comparisons(per_list, 300)
    assert {(row["system"], row["against"]) for row in rows} == common.keys()
    assert len(rows) == 2 * 4 * len(METRIC_NAMES)
    for row in rows:
        if row["metric"] not in ("ndcg@1", "map_paper@5", "hr@10"):
            continue
        theirs_backbone = "none" if row["against"] == "popularity" else row["backbone"]
        sides = []
        for backbone, system in ((row["backbone"], row["system"]), (theirs_backbone, row["against"])):
            side = per_list[(per_list["backbone"] == backbone) & (per_list["system"] == system)]
            sides.append(side[["list_id", "user_id", "seed", row["metric"]]])
        keys = ["list_id", "user_id"] if row["against"] == "popularity" else ["list_id", "user_id", "seed"]
        joined = sides[0].merge(sides[1].drop(columns=[] if "seed" in keys else "seed"), on=keys)
        mine, theirs = (joined[f"{row['metric']}_{side}"].astype(float) for side in "xy")
        joined["delta"] = mine - theirs
        lists = joined.groupby("list_id").agg(delta=("delta", "mean"), user=("user_id", "first"))
        assert len(lists) == 150
        wanted = paired_bootstrap(lists["delta"].to_numpy(), lists["user"].to_numpy(), 300)
        assert [row["delta"], *row["ci95"], row["p_value"]] == pytest.approx(list(wanted), abs=1e-12)
        per_seed = joined.groupby("seed")["delta"].mean()
        assert row["seeds"] == len(per_seed) == common[row["system"], row["against"]]
        spread = pytest.approx(per_seed.std()) if len(per_seed) > 1 else None
        assert row["delta sd"] == spread
    assert (
        only(rows, backbone="prm", system="dpo4rec-round1", against="statistics", metric="hr@1")["seeds"] == 1
    )


def test_without_knowledge_or_a_common_seed() -> None:
    """Nothing to set against the backbone but popularity; a system that shares no seed with it is left out."""
    fits = {("mir", "backbone", 0): [0.5] * 4, ("mir", "base-llm", 1): [0.75] * 4}
    for number in (1, 2):
        per_list = frame(SIMPLE | dict(list(fits.items())[:number]))
        rows = comparisons(per_list, 100)
        assert {(row["system"], row["against"], row["seeds"]) for row in rows} == {
            ("backbone", "popularity", 1)
        }
        assert {row["delta sd"] for row in rows} == {None}
        assert {row["ndcg@5 delta"] for row in breakdown(per_list, ABOUT, 100)} == {None}
    assert comparisons(frame(SIMPLE), 100) == []


def test_one_user_has_no_interval() -> None:
    rows = comparisons(frame(SIMPLE | DLCM, users=[1, 1, 1, 1]), 100)
    row = only(rows, system="base-llm", metric="ndcg@5")
    assert (row["delta"], row["ci95"], row["p_value"]) == (0.125, [None, None], None)


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
    """A bucket's figures are those of its lists alone, and the buckets hold every list once."""
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
        breakdown(per_list, ABOUT[:3])
    with pytest.raises(ValueError, match="a list twice"):
        breakdown(per_list, pd.concat([ABOUT, ABOUT[:1]]))
    with pytest.raises(ValueError, match="without a history_length"):
        breakdown(per_list, ABOUT.assign(history_length=[1, 2, 3, np.nan]))
    none = breakdown(per_list, ABOUT.assign(popularity=np.nan), 100)
    assert {row["by"] for row in none} == {"history length", "lists of the user"}


def test_table_one_is_the_papers() -> None:
    """Some cells, and the sums over the 18 rows of each printed column (awk over the paper's text)."""
    assert TABLE_I["ml-1m"]["dlcm"]["backbone"] == (0.72815, 0.77053)
    assert TABLE_I["amazon-books"]["prm"]["DPO4Rec_Llama3.1-8B"] == (0.67397, 0.70174)
    assert TABLE_I["amazon-beauty"]["setrank"]["KAR"] == (0.78903, 0.80977)
    sums = {
        dataset: tuple(
            round(sum(pair[place] for methods in backbones.values() for pair in methods.values()), 5)
            for place in (0, 1)
        )
        for dataset, backbones in TABLE_I.items()
    }
    assert sums == {
        "ml-1m": (13.28816, 14.01483),
        "amazon-books": (11.8918, 12.36528),
        "amazon-beauty": (14.42925, 14.77517),
    }
    assert {len(methods) for backbones in TABLE_I.values() for methods in backbones.values()} == {6}


@pytest.mark.parametrize(
    ("dataset", "files", "key"),
    [
        ("movielens", ["d/ratings.dat", "d/movies.dat", "d/users.dat"], "ml-1m"),
        ("movielens", ["s3://b/ml-1m/users.dat?version=2"], "ml-1m"),
        ("movielens", ["d/ratings.dat", "d/movies.dat"], None),  # 10M
        ("amazon2018", ["d/Books_5.json.gz", "d/meta_Books.json.gz"], "amazon-books"),
        ("amazon2018", ["All_Beauty_5.json"], "amazon-beauty"),
        ("amazon2018", ["d/Luxury_Beauty_5.json.gz", "d/meta_Books.json.gz"], None),
        ("amazon2023", ["d/Books.jsonl.gz"], None),
        ("table", ["users.dat"], None),
    ],
)
def test_which_dataset_of_the_paper(dataset: str, files: list[str], key: str | None) -> None:
    assert key_of(dataset, iter(files)) == key


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    """Several backbones, one of them not in the paper, one with a name that LaTeX would trip over."""
    systems = ["backbone", "base-llm", "dpo4rec-round1", "dpo4rec-round12"]
    fits = [
        (backbone, system, seed)
        for backbone in ("dlcm", "mir", "own_net&1%", "a_backbone_of_a_very_long_name")
        for system in systems
        for seed in range(2)
    ]
    per_list = random_frame([*SIMPLE, *fits])
    ids = np.unique(per_list["list_id"])
    about = pd.DataFrame({"list_id": ids, "history_length": ids % 9, "popularity": ids % 7 * 1.5})
    return summarise(per_list, about, 200, "amazon-beauty")


def markdown_rows(text: str) -> list[list[str]]:
    """The cells of a Markdown text's first table, without its head."""
    table = text.split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def level(cell: str) -> tuple[float, float | None]:
    mean, _, sd = cell.partition(" ± ")
    return float(mean), float(sd) if sd else None


def change(cell: str) -> tuple[float | None, float | None]:
    found = re.fullmatch(r"([+-][\d.]+)(?: \(p <?([\d.]+)\))?", cell)
    return (float(found[1]), float(found[2]) if found[2] else None) if found else (None, None)


def test_layout_sets_the_paper_beside_the_run(summary: dict[str, Any]) -> None:
    """KAR minus backbone, DLCM on Amazon-Beauty: .80909 - .79069 = .01840 and .82667 - .80959 = .01708."""
    lines = layout(summary["systems"], summary["comparisons"], "amazon-beauty")
    assert [line["method"] for line in lines[:9]] == [
        "random", "popularity", "backbone", "base-llm", "dpo4rec-round1", "dpo4rec-round12", "backbone", "KAR",
        "KAR_chatgpt-4o",
    ]  # fmt: skip
    kar = only(lines, method="KAR")
    assert (kar["backbone"], kar["source"]) == ("dlcm", "paper")
    assert (kar["map_paper@5"], kar["map_paper@5 delta"], kar["ndcg@5 delta"]) == (0.80909, 0.0184, 0.01708)
    assert kar["ndcg@5 p_value"] is None
    mine = only(lines, backbone="mir", method="dpo4rec-round12")
    wanted = only(
        summary["comparisons"], backbone="mir", system="dpo4rec-round12", against="backbone", metric="ndcg@5"
    )
    assert (mine["ndcg@5 delta"], mine["ndcg@5 p_value"]) == (wanted["delta"], wanted["p_value"])
    system = only(summary["systems"], backbone="mir", system="dpo4rec-round12")
    assert (mine["ndcg@5"], mine["ndcg@5 sd"]) == (system["ndcg@5"], system["ndcg@5 sd"])
    assert (
        only(lines, backbone="mir", method="backbone")["ndcg@5 delta"] is None
    )  # that one is against popularity
    assert {line["backbone"] for line in lines if line["source"] == "paper"} == {"dlcm"}
    alone = layout(summary["systems"], summary["comparisons"])
    assert alone == [line for line in lines if line["source"] == "run"]
    with pytest.raises(KeyError, match="ml-20m"):
        layout(summary["systems"], summary["comparisons"], "ml-20m")


def test_csv_markdown_and_latex_hold_the_same_figures(summary: dict[str, Any]) -> None:
    """Each is read back and set against the layout; Markdown and LaTeX are rounded."""
    arguments = summary["systems"], summary["comparisons"], summary["paper"]
    lines = layout(*arguments)
    back = pd.read_csv(io.StringIO(to_csv(*arguments)))
    pd.testing.assert_frame_equal(back, pd.DataFrame(lines), check_exact=True, check_dtype=False)

    rows = markdown_rows(to_markdown(*arguments))
    assert len(rows) == len(lines)
    for cells, line in zip(rows, lines, strict=True):
        assert cells[0] in ("", line["backbone"], line["backbone"].upper())
        assert cells[1] == line["method"] + (" (paper)" if line["source"] == "paper" else "")
        for name, shown in zip(HEADLINE, (cells[2:4], cells[4:6]), strict=True):
            places = 5e-6 if line["source"] == "paper" else 5.001e-5
            for got, key, room in (
                (level(shown[0])[0], name, places),
                (level(shown[0])[1], f"{name} sd", places),
                (change(shown[1])[0], f"{name} delta", places),
                (change(shown[1])[1], f"{name} p_value", 5.001e-4),
            ):
                assert got == (None if line[key] is None else pytest.approx(line[key], abs=room)), (key, line)

    tex = to_latex(*arguments)
    body = [line for line in tex.splitlines() if line.endswith(r"\\")][1:]
    shown = ""
    for text, cells in zip(body, rows, strict=True):
        plain = re.sub(r"\\([&%_])", r"\1", text.removesuffix(r" \\").replace(r"$\pm$", "±")).replace("$", "")
        found = [cell.strip() for cell in re.split(r" & ?", plain)]
        assert found[1:] == cells[1:]
        assert found[0] == (cells[0] if cells[0] != shown else "")  # once per block
        shown = cells[0]


def test_latex_is_a_plain_tabular(summary: dict[str, Any]) -> None:
    """Six columns in every row, groups and maths closed, no character left that LaTeX would read as a command."""
    lines = to_latex(summary["systems"], summary["comparisons"], summary["paper"]).splitlines()
    code = [line for line in lines if not line.startswith("%")]
    assert (code[0], code[1], code[-2], code[-1]) == (
        r"\begin{tabular}{llrrrr}", r"\toprule", r"\bottomrule", r"\end{tabular}"
    )  # fmt: skip
    rules = [line for line in code[2:-2] if line.startswith("\\")]
    assert rules == [r"\midrule"] * 2 + [r"\cmidrule{2-6}"] + [r"\midrule"] * 4
    for line in code[2:-2]:
        if line in rules:
            continue
        assert line.endswith(r" \\")
        assert len(re.findall(r"(?<!\\)&", line)) == 5
        assert line.count("$") % 2 == 0
        commands = re.sub(r"\\[&%#_{}]|\\pm|\\Delta|\\\\$", "", line)
        assert not re.search(r"[\\%#_{}~^]", commands), line
        assert line.isascii()
    assert any(line.startswith(r"own\_net\&1\% & backbone & ") for line in code)
    assert any("not the levels" in line for line in lines if line.startswith("%"))


def test_latex_escapes_everything_special() -> None:
    assert escape("a_b&c%d$e#f{g}") == r"a\_b\&c\%d\$e\#f\{g\}"
    assert escape("\\~^") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}"


def test_markdown_says_what_compares(summary: dict[str, Any]) -> None:
    arguments = summary["systems"], summary["comparisons"]
    beside = to_markdown(*arguments, "amazon-beauty")
    assert "arXiv 2410.05939, Table I, amazon-beauty" in beside
    assert "protocol and lists differ" in beside and "only the differences compare" in beside
    assert "over 2 seeds" in beside
    alone = to_markdown(*arguments)
    assert "2410.05939" not in alone and "(paper)" not in alone
    row = only(summary["comparisons"], backbone="mir", system="base-llm", against="backbone", metric="ndcg@5")
    line = next(line for line in beside.splitlines() if line.startswith("| MIR | base-llm | backbone |"))
    found = [float(number) for number in re.findall(r"[+-]?\d\.\d+", line)][4:]
    assert found == pytest.approx([row["delta"], *row["ci95"], row["p_value"]], abs=5.001e-4)


def test_printed_fits_the_terminal(summary: dict[str, Any]) -> None:
    lines = printed(summary).splitlines()
    assert max(map(len, lines)) <= 110
    assert len(lines) == 1 + len(summary["systems"]) + 3 + 2 * 4 * (1 + 3 + 2)
    row = only(summary["systems"], backbone="dlcm", system="base-llm")
    line = next(line for line in lines if line.startswith("DLCM     base-llm  "))
    for name in (*HEADLINE, "map@5", "mrr@10", "hr@10", "ndcg@5 by user"):
        assert f"{row[name]:.4f}" in line
    assert line.endswith(" 2")
    assert any(re.match(r"DLCM +dpo4rec-round12 +base-llm +[+-]0\.\d{4} \[", line) for line in lines)


def test_one_seed_and_one_user_are_shown_without_deviation_and_interval() -> None:
    fits = {fit: values for fit, values in (SIMPLE | DLCM).items() if fit[2] == 0}
    found = summarise(frame(fits, users=[1, 1, 1, 1]), ABOUT, 100)
    text = to_markdown(found["systems"], found["comparisons"])
    assert "one seed" in text and "±" not in text
    assert "| DLCM | base-llm | 0.1875 | +0.0312 | 0.3750 | +0.0625 |" in text
    assert "±" not in printed(found) and "nan" not in printed(found) + text


def test_no_difference_has_no_sign_of_one() -> None:
    """A difference of -.00001 rounds to +0.0000."""
    fits = SIMPLE | {("prm", "backbone", 0): [0.5] * 4, ("prm", "base-llm", 0): [0.49999] * 4}
    found = summarise(frame(fits), ABOUT, 100)
    assert "-0.0000" not in to_markdown(found["systems"], found["comparisons"]) + printed(found)


def test_written_tables_read_back(summary: dict[str, Any], tmp_path: Path) -> None:
    """The summary is plain JSON, and the tables are the same from what JSON gives back."""
    files = write_tables(tmp_path, json.loads(json.dumps(summary, allow_nan=False)))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.name for file in files)
    assert {file.name for file in files} == {
        "table.csv", "table1.csv", "table.md", "table.tex", "comparisons.csv", "breakdown.csv",
    }  # fmt: skip
    tables = {
        file.name: list(csv.DictReader(file.open(encoding="utf-8")))
        for file in files
        if file.suffix == ".csv"
    }
    for got, row in zip(tables["table.csv"], summary["systems"], strict=True):
        assert got == {name: "" if value is None else str(value) for name, value in row.items()}
        assert {"ndcg@5 by user", "map_paper@5 on lists with a positive sd", "hr@10"} < got.keys()
    for got, row in zip(tables["comparisons.csv"], summary["comparisons"], strict=True):
        assert [float(got[name]) for name in ("delta", "ci95_low", "ci95_high", "p_value", "delta sd")] == [
            row["delta"], *row["ci95"], row["p_value"], row["delta sd"],
        ]  # fmt: skip
    for got, row in zip(tables["breakdown.csv"], summary["breakdown"], strict=True):
        assert (got["by"], got["bucket"], float(got["ndcg@5"])) == (row["by"], row["bucket"], row["ndcg@5"])
        low, high = row["ndcg@5 ci95"] or ("", "")
        assert (got["ndcg@5 ci95_low"], got["ndcg@5 ci95_high"]) == (str(low), str(high))
