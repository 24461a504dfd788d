"""The report as one HTML page: no network, no files beside it. Names and texts of users are data on it, never markup."""

from __future__ import annotations

import importlib.resources
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dpo4rec_ray.evaluation.ladder import FAILS, HOLDS, NOT_SHOWN, Rung, figures
from dpo4rec_ray.evaluation.systems import Row
from dpo4rec_ray.evaluation.verdict import HARMS, HELPS, verdict
from dpo4rec_ray.report import page_tables as tables
from dpo4rec_ray.report.evaluation_charts import evaluation_charts
from dpo4rec_ray.report.round_charts import round_charts, time_charts
from dpo4rec_ray.report.words import words

# Verdicts of rungs -> a sign, and the class of its colour: both, as not everybody tells red from green.
LIGHTS = {HOLDS: ("✓", "good"), FAILS: ("✗", "bad"), NOT_SHOWN: ("?", "open")}
OUTCOMES = {HELPS: "good", HARMS: "bad"}  # of a verdict; others are "open"
# Rungs whose light does not follow from their interval and bound alone.
THRESHOLDS = {
    "spread": "above 0, and fewer than half of the users tied",
    "style gain": "at most the reading gain",
}


def render(
    summary: Mapping[str, Any],
    *,
    stages: Sequence[Row],
    heldout: Sequence[Row] = (),
    steps: Sequence[Row] = (),
    spreads: Sequence[Row] = (),
    users: Sequence[Mapping[str, Any]] = (),
    recipe: str = "",
    links: Sequence[str] = (),
) -> str:
    """The page.

    summary: of summary.json; stages: of report/spent.py; heldout, steps, spreads: of report/measured.py; users: of
    report/text_browser.py; recipe: TOML that makes the run again; links: of files, below the run's folder.
    """
    environment = Environment(
        loader=PackageLoader("dpo4rec_ray", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"number": tables.number, "interval": tables.interval, "shown": tables.shown}
    charts = {
        "evaluation": evaluation_charts(summary),
        "rounds": round_charts(summary, heldout, steps, spreads),
        "time": list(time_charts(stages)),
    }
    return environment.get_template("report.html.jinja").render(
        summary=summary,
        verdict=verdict(summary),
        next_command=_next_command(summary) if recipe else "",
        outcomes=OUTCOMES,
        lights=LIGHTS,
        threshold=_threshold,
        figures=figures,
        words=words(with_rounds=bool(summary["rounds"])),
        charts=charts,
        test_tables=tables.of_test_users(summary),
        reward_tables=[
            table for name, stats in summary["rewards"].items() for table in tables.of_reward(name, stats)
        ],
        round_tables={row["round"]: tables.of_round(row) for row in summary["rounds"]},
        stage_table=tables.of_stages(stages),
        users=users,
        users_data=embedded(users),
        specs=embedded({chart.key: chart.spec for own in charts.values() for chart in own}),
        recipe=recipe,
        recipe_link=f"data:text/plain;charset=utf-8,{quote(recipe)}",
        links=links,
        vega=Markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")),
        style=_own("report.css"),
        script=_own("report.js"),
    )


def _next_command(summary: Mapping[str, Any]) -> str:
    """The run with the change to try first; "" where there is none."""
    name, changes = summary["run"], summary.get("next_change", ())
    if not changes:
        return ""
    return shlex.join(["dpo4rec", "run", f"{name}.toml", *changes, f"run.name={name}-next"])


def _threshold(rung: Rung) -> str:
    return THRESHOLDS.get(rung["name"], f"above {rung['bound']:g}")


def _own(name: str) -> Markup:
    """A file of this package."""
    return Markup((importlib.resources.files("dpo4rec_ray.report") / name).read_text(encoding="utf-8"))


def embedded(content: Any) -> Markup:
    """JSON that can stand in a <script>: without `<` nothing in it ends the script or begins a comment."""
    text = json.dumps(_short(content), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _short(content: Any) -> Any:
    """Floats with five significant digits, as nobody reads more; NaN, which JSON does not know, is null."""
    if isinstance(content, float):
        return float(f"{content:.5g}") if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {str(key): _short(value) for key, value in content.items()}
    return [_short(value) for value in content] if isinstance(content, list | tuple) else content
