from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dpo4rec_ray.core.intervals import paired_bootstrap
from dpo4rec_ray.core.metrics import METRICS
from dpo4rec_ray.evaluation.breakdown import breakdown
from dpo4rec_ray.evaluation.systems import HEADLINE, METRIC_NAMES
from dpo4rec_ray.evaluation.tables import comparisons, seed_rows, systems_table, write_tables
from tests.unit.evaluation.frames import ABOUT, DLCM, SIMPLE, Fits, frame, only, random_frame


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
        comparisons(good.drop(random.index[0]), 100)
    with pytest.raises(ValueError, match="not measured on the lists"):
        comparisons(good.assign(user_id=np.where(good["system"] == "random", 9, good["user_id"])), 100)
    with pytest.raises(ValueError, match="no rows of upper-bound"):
        seed_rows(good[good["system"] != "upper-bound"])
    with pytest.raises(ValueError, match="not finite"):
        comparisons(good.assign(**{"hr@3": np.where(good["seed"] == 1, np.nan, 0.0)}), 100)


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
