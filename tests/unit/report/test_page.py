"""The page of constructed runs: what is on it, that names and texts stay text, and that no chart asks for what is not there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import vl_convert

from dpo4rec_ray.evaluation.tables import summarise
from dpo4rec_ray.report import html
from dpo4rec_ray.report.evaluation_charts import evaluation_charts
from dpo4rec_ray.report.round_charts import round_charts, time_charts
from tests.unit.evaluation.frames import ABOUT, DLCM, SIMPLE, frame, random_frame

HOSTILE = "</script><script>alert(1)</script><!--"
STAGE = {"stage": "encode", "round": 0, "seconds": 61.25, "rows_in": 1, "rows_out": 2, "skipped": False}
STAGES = [STAGE | {"tokens": 1234, "tokens_per_s": 20.1, "cost": None, "gpus": 2.0, "gpu_hours": 0.034}]
HELDOUT = [{"round": 1, "before": 0.1, "after": 0.2}, {"round": 1, "before": 0.3, "after": 0.25}]
STEPS = [
    {"training": "round 1", "figure": "loss", "kind": kind, "step": step, "value": 0.6, "smooth": smooth}
    for step, kind, smooth in ((1, "training", 0.6), (2, "training", 0.6), (2, "held out", None))
]
SPREADS = [
    {"round": 1, "low": 0.0, "high": 0.1, "users": 3},
    {"round": 1, "low": 0.1, "high": 0.2, "users": 5},
]


def interval(name: str, mean: float) -> dict[str, Any]:
    return {name: mean, f"{name}_ci95": [mean - 0.1, mean + 0.1]}


def round_of(**changes: Any) -> dict[str, Any]:
    """A round as summary.json has it."""
    figure = {"before": 0.1, "after": 0.3, "change": 0.2, "change_ci95": [0.1, 0.3]}
    rung = {"name": "shuffle drop", "value": 0.5, "ci95": None, "bound": 0.0, "verdict": "not shown"}
    watched = {"reward": {"change": 0.1, "change_ci95": [0.0, 0.2]}}
    turn = {"turn": 1, "objective": "grpo", "users": 9, "steps": 3, "mean_reward": -2.0, "spread": 0.2}
    row = {
        "round": 1,
        "policy": 1,
        "users": 9,
        "samples": 18,
        "pairs": 7,
        "heldout_users": 9,
        "failed": {"empty_text": 2},
        "dropped": {},
        "generation": {"tokens": 123456},
        "training": {
            "objective": "dpo",
            "first_loss": 0.6931471805599453,
            "accuracy": None,
            "warnings": ["far"],
        },
        "diagnosis": {"metrics": {"a": 1}, "best tied": 0.25},
        "choice": {"kept": False, "against": 0, **interval("reward", 0.2), **interval("reading", -0.2)},
        "figures": {"reading": figure},
        "ladder": [rung | {"says": "<i>why</i>"}],
        "turns": [
            turn | {"watched": watched, "warnings": []},
            turn | {"turn": 2, "watched": {}, "warnings": ["late"]},
        ],
    }
    return row | changes


def summary_of(**changes: Any) -> dict[str, Any]:
    """The summary of a run without rounds."""
    about = {"run": "own", "seed": 3, "generator": "statistics", "trainer": "none", "best_round": 0}
    spent = {"total_seconds": 61.2, "peak_rss_mb": 512, "stages": [STAGE], "versions": {"ray": "2"}}
    machine = {"commit": "abc", "machine": {"cpus": 2, "memory_gib": 24}}
    evaluated = summarise(frame(SIMPLE | DLCM), ABOUT, 100)
    return {**about, **spent, **machine, **evaluated, "rewards": {}, "rounds": [], **changes}


def page(users: Any = (), recipe: str = "", **changes: Any) -> str:
    rows = {"heldout": HELDOUT, "steps": STEPS, "spreads": SPREADS} if changes.get("rounds") else {}
    return html.render(summary_of(**changes), stages=STAGES, users=users, recipe=recipe, **rows)


def own(text: str) -> str:
    """The page without Vega, which has markup in its strings."""
    return re.sub(r'<script type="module">/\* Vega.*?</script>', "", text, flags=re.DOTALL)


def test_every_system_and_difference_is_on_the_page() -> None:
    text = page()
    table = text[text.index('<table id="systems"') :].partition("</table>")[0]
    assert table.count(">DLCM</td>") == 3
    assert ">dpo4rec-round1 minus base-llm<" in text
    assert ">0.5000 ± 0.1768<" in table  # base-llm: .375 and .625 over seeds
    assert len(text) < 1_100_000, "most of it is Vega"


def test_what_comes_from_outside_is_text_and_not_markup() -> None:
    user = {"id": HOSTILE, "profile": HOSTILE, "history": [[HOSTILE, 5.0]], "rounds": [], "first": HOSTILE}
    clean = own(page())
    text = own(page([user], HOSTILE, run=HOSTILE, versions={"<b>": "&"}, rounds=[round_of()]))
    assert text.count("<script") == clean.count("<script") and text.count("</script") == clean.count(
        "</script"
    )
    assert "<!--" not in text and "&lt;b&gt; &amp;" in text and "&lt;i&gt;why&lt;/i&gt;" in text
    (data,) = re.findall(r'<script type="application/json" id="users-data">(.*?)</script>', text)
    assert json.loads(data) == [user]


def test_data_on_the_page_has_no_sixteen_digits_and_no_nan() -> None:
    assert json.loads(html.embedded({"a": [1 / 3, np.nan, 7, True, None], 2: "x"})) == {
        "a": [0.33333, None, 7, True, None],
        "2": "x",
    }
    shown = own(page(rounds=[round_of()]))
    assert not re.findall(r"\d\.\d{7,}", shown)
    assert "0.6931" in shown and "123,456" in shown


def test_a_round_shows_its_ladder_its_figures_and_why_it_was_kept() -> None:
    text = page(rounds=[round_of()])
    assert "Round 1: not kept" in text
    assert "reward +0.2000 [+0.1000, +0.3000], reading" in text
    ladder = text[text.index('<ol class="ladder">') :].partition("</ol>")[0]
    assert "shuffle drop" in ladder and "+0.5000" in ladder and "Threshold: above 0" in ladder
    assert text.count("reading gain)") == 1 and "style gain)" not in text, "only figures that there are"
    assert "Warning of the training: far" in text and "Turn 2: late" in text
    assert "watched users since the round began" in text
    assert '<ul class="why">' not in text
    worse = round_of()
    worse["choice"] |= {"why": ["its <texts> are longer"]}
    assert "<li>its &lt;texts&gt; are longer</li>" in page(rounds=[worse])


def test_a_run_without_rounds_has_no_sections_about_them() -> None:
    text = page()
    for name in ("ladder", "users", "rounds"):
        assert f'<section id="{name}"' not in text and f'href="#{name}"' not in text
    assert '<section id="verdict"' in text and '<section id="time"' in text
    assert "<dt>base-llm</dt>" in text and "<dt>reward</dt>" not in text
    assert "<dt>reward</dt>" in page(rounds=[round_of()])


def test_the_page_says_how_many_users_it_is_judged_on() -> None:
    assert "Judged on 3 test users with 4 lists." in page()
    # An older version's evaluation did not count them.
    older = {key: value for key, value in summary_of().items() if key not in ("test_users", "test_lists")}
    assert "Judged on" not in html.render(older, stages=STAGES)
    splits = {"users/test": 1100, "lists/test": 3864}
    counted = html.render(older | {"prepare": {"splits": splits}}, stages=STAGES)
    assert "Judged on 1,100 test users with 3,864 lists." in counted


def specs() -> Iterator[Any]:
    summary = summary_of(rounds=[round_of()])
    fits = [("none", "upper-bound", 0), *((name, "backbone", 0) for name in ("prm", "mir"))]
    fits += [(name, "base-llm", 0) for name in ("prm", "mir")]
    about = pd.DataFrame({"list_id": np.arange(1000, 1150), "history_length": np.arange(150) % 20})
    about["popularity"] = np.arange(150.0)
    several = summary_of(**summarise(random_frame(fits), about, 100))
    for one in (summary, several):
        charts = [*evaluation_charts(one), *round_charts(one, HELDOUT, STEPS, SPREADS), *time_charts(STAGES)]
        yield from (pytest.param(chart, id=chart.key) for chart in charts)


@pytest.mark.parametrize("chart", list(specs()))
def test_a_chart_compiles_and_names_only_columns_that_its_rows_have(chart: Any) -> None:
    vega = vl_convert.vegalite_to_vega(chart.spec)
    assert chart.spec["width"] == "container" and chart.alt and chart.spec["description"] == chart.alt
    assert vega["marks"]
    for layer in chart.spec.get("layer", [chart.spec]):
        data = layer.get("data", chart.spec.get("data"))
        rows = data["values"] if "values" in data else chart.spec["datasets"][data["name"]]
        for name, channel in layer["encoding"].items():
            for one in channel if isinstance(channel, list) else [channel]:
                if "field" in one:
                    missing = [row for row in rows if one["field"] not in row]
                    assert not missing, (name, one["field"])


def test_the_page_draws_every_chart_that_it_has_a_specification_of() -> None:
    text = page(rounds=[round_of()])
    (data,) = re.findall(r'<script type="application/json" id="specs">(.*?)</script>', text, re.DOTALL)
    places = re.findall(r'data-chart="(.*?)"', text)
    assert sorted(json.loads(data)) == sorted(places) and len(set(places)) == len(places)
    assert {
        "gains-ndcg",
        "means",
        "across-rounds",
        "rewards-1",
        "watched-reward",
        "spread",
        "step-loss",
        "seconds",
    } <= set(places)
