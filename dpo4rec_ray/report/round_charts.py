"""Charts of the rounds: rewards of held-out users, steps of the training, spread of the rewards, and time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import altair as alt

from dpo4rec_ray.evaluation.systems import Row
from dpo4rec_ray.report.chart import ROWS, Chart, colour, interval_tips, intervals, made, tips, zoom
from dpo4rec_ray.report.measured import STEP_FIGURES


def round_charts(
    summary: Mapping[str, Any], heldout: Sequence[Row], steps: Sequence[Row], spreads: Sequence[Row]
) -> list[Chart]:
    """In the order of the page. heldout, steps, spreads: rows of report/measured.py."""
    return [*_rewards(heldout), *_watched(summary), *_spreads(spreads), *_training(steps)]


def _rewards(rows: Sequence[Row]) -> Iterator[Chart]:
    for number in dict.fromkeys(row["round"] for row in rows):
        own = [row for row in rows if row["round"] == number]
        values = [row[side] for row in own for side in ("before", "after")]
        low, high = min(values), max(values)
        rises = sum(row["after"] > row["before"] for row in own)
        line = alt.Chart(alt.InlineData([{"one": low, "two": low}, {"one": high, "two": high}]))
        scale = alt.Scale(zero=False, nice=True)
        dots = alt.Chart(ROWS).mark_circle(opacity=0.5, size=40)
        chart = alt.layer(
            line.mark_line(strokeDash=[4, 3], opacity=0.7).encode(
                x=alt.X("one:Q", scale=scale), y=alt.Y("two:Q", scale=scale)
            ),
            dots.encode(
                x=alt.X("before:Q", title="reward before", scale=scale),
                y=alt.Y("after:Q", title="reward after", scale=scale),
                tooltip=tips(("before:Q", "before", ".4f"), ("after:Q", "after", ".4f")),
            ),
        ).add_params(zoom("x", "y"))
        yield made(
            f"rewards-{number}",
            f"Reward of held-out users, round {number}",
            "A dot per validation user: the mean reward of the user's texts before and after. Above the dashed line it rose.",
            f"The reward rises for {rises} of {len(own)} validation users.",
            chart,
            own,
        )


def _training(rows: Sequence[Row]) -> Iterator[Chart]:
    for figure, title in STEP_FIGURES.items():
        own = [row for row in rows if row["figure"] == figure]
        if not own:
            continue
        color = colour("training", own)
        shown = tips(
            ("training:N", "training", ""),
            ("step:Q", "step", ","),
            ("value:Q", "value", ".4g"),
            ("kind:N", "of", ""),
        )
        x = alt.X("step:Q", title="step")
        base = alt.Chart(ROWS).encode(color=color, tooltip=shown)
        line = base.transform_filter("datum.kind == 'training'")
        y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False))
        chart = alt.layer(
            line.mark_line(opacity=0.3, strokeWidth=1).encode(x=x, y=y),
            line.mark_line(strokeWidth=2).encode(x=x, y=alt.Y("smooth:Q")),
            base.transform_filter("datum.kind == 'held out'")
            .mark_point(filled=True, size=90, shape="diamond")
            .encode(x=x, y=y),
        ).add_params(zoom("x", "y"))
        last = {row["training"]: row["smooth"] for row in own if row["kind"] == "training"}
        held = any(row["kind"] == "held out" for row in own)
        yield made(
            f"step-{figure}",
            f"Training: {title}",
            "Faint: each step; strong: the mean around it" + ("; diamonds: held-out users." if held else "."),
            f"{title} at the end: " + "; ".join(f"{name} {value:.4g}" for name, value in last.items()),
            chart,
            own,
        )


def _watched(summary: Mapping[str, Any]) -> Iterator[Chart]:
    """With several turns per round: how the watched validation users fare from turn to turn."""
    for figure in ("reward", "reading"):
        rows = []
        for turn in (turn for row in summary["rounds"] for turn in row.get("turns", [])):
            one = turn["watched"].get(figure)
            if one and None not in one["change_ci95"]:
                low, high = one["change_ci95"]
                rows.append({"turn": turn["turn"], "value": one["change"], "low": low, "high": high})
        if not rows:
            continue
        base = alt.Chart(ROWS).encode(
            x=alt.X("turn:O", title="turn", axis=alt.Axis(labelAngle=0)),
            tooltip=tips(("turn:O", "turn", ""), *interval_tips("change")),
        )
        chart = intervals(base, "y", f"change of {figure}", base.mark_line().encode(y="value:Q"))
        yield made(
            f"watched-{figure}",
            f"Turn by turn: {figure} of watched users",
            "Change since the round began, of texts sampled at the start of each turn, with 95 % intervals over users.",
            f"Change of {figure}: " + "; ".join(f"turn {row['turn']} {row['value']:+.4f}" for row in rows),
            chart,
            rows,
        )


def _spreads(rows: Sequence[Row]) -> Iterator[Chart]:
    if not rows:
        return
    own: list[Row] = [{**row, "series": f"round {row['round']}"} for row in rows]
    chart = (
        alt.Chart(ROWS)
        .mark_bar(opacity=0.6)
        .encode(
            x=alt.X("low:Q", title="standard deviation of a user's rewards", bin="binned"),
            x2="high:Q",
            y=alt.Y("users:Q", title="users", stack=None),
            color=colour("series", own),
            tooltip=tips(
                ("series:N", "round", ""),
                ("low:Q", "from", ".4f"),
                ("high:Q", "to", ".4f"),
                ("users:Q", "users", ","),
            ),
        )
        .add_params(zoom("x"))
    )
    flat = sum(row["users"] for row in own if row["low"] == 0)
    total = sum(row["users"] for row in own)
    yield made(
        "spread",
        "Spread of rewards",
        "How far the rewards of one user's texts are apart. Users at 0 teach nothing: all their texts are worth the same.",
        f"{flat} of {total} users have rewards in the lowest thirtieth of the range.",
        chart,
        own,
    )


def time_charts(stages: Sequence[Row]) -> Iterator[Chart]:
    """Where the time went."""
    rows = [{"name": f"{row['stage']}({row['round']})", "seconds": row["seconds"]} for row in stages]
    if not rows:
        return
    chart = (
        alt.Chart(ROWS)
        .mark_bar()
        .encode(
            y=alt.Y("name:N", title=None, sort=None),
            x=alt.X("seconds:Q", title="seconds"),
            tooltip=tips(("name:N", "stage", ""), ("seconds:Q", "seconds", ",.1f")),
        )
    )
    longest = max(rows, key=lambda row: row["seconds"])
    yield made(
        "seconds",
        "Where the time went",
        "Seconds of each stage when it ran; the number in brackets is its turn.",
        f"The longest stage is {longest['name']} with {longest['seconds']:.0f} s.",
        chart,
        rows,
        18 * len(rows) + 50,
    )
