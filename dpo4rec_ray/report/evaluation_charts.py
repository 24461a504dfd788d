"""Charts of the test users: what texts add, by round and for whom, and the levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import altair as alt

from dpo4rec_ray.evaluation.systems import BACKBONE, HEADLINE, NO_BACKBONE, TITLES, Row, label
from dpo4rec_ray.report.chart import PER_ROW, ROWS, Chart, colour, interval_tips, intervals, made, tips, zoom

NDCG = HEADLINE[1]
# Kind of bucket -> title of its axis.
BUCKETS = {
    "history length": "items in the user's history",
    "lists of the user": "lists of the user",
    "popularity": "likes in training per liked item of the list",
}


def evaluation_charts(summary: Mapping[str, Any]) -> list[Chart]:
    """In the order of the page."""
    return [*_gains(summary), *_across_rounds(summary), *_breakdowns(summary), *_means(summary)]


def _with_interval(row: Row, **names: Any) -> Row | None:
    """The row's NDCG or other difference as value, low and high; None where it has no interval."""
    low, high = row["ci95"]
    return None if low is None or high is None else {**names, "value": row["delta"], "low": low, "high": high}


def _listed(rows: Sequence[Row], name: str) -> str:
    parts = [
        f"{row[name]} {row['value']:+.4f}, 95 % from {row['low']:+.4f} to {row['high']:+.4f}" for row in rows
    ]
    return "; ".join(parts)


def _gains(summary: Mapping[str, Any]) -> Iterator[Chart]:
    for metric in reversed(HEADLINE):
        found = [
            _with_interval(
                row, name=f"{label(row['backbone'])} · {row['system']}", backbone=label(row["backbone"])
            )
            for row in summary["comparisons"]
            if row["metric"] == metric and row["against"] == BACKBONE
        ]
        rows = [row for row in found if row]
        if not rows:
            continue
        base = alt.Chart(ROWS).encode(
            y=alt.Y("name:N", title=None, sort=None),
            color=alt.Color("backbone:N", legend=None),
            tooltip=tips(
                ("name:N", "system", ""),
                *interval_tips(f"{TITLES[metric]} minus the backbone"),
            ),
        )
        chart = intervals(base, "x", f"{TITLES[metric]} minus the backbone")
        yield made(
            f"gains-{metric.partition('@')[0]}",
            f"What texts add: {TITLES[metric]}",
            "Each system against its backbone on the same test lists, with the 95 % interval over users. Right of the dashed "
            "line is a gain.",
            f"{TITLES[metric]} minus the backbone's: {_listed(rows, 'name')}",
            chart,
            rows,
            PER_ROW * len(rows) + 50,
        )


def _means(summary: Mapping[str, Any]) -> Iterator[Chart]:
    rows = []
    for row in summary["systems"]:
        # Without those that are not fitted: far from all others, they would leave these no room to be told apart.
        if row["backbone"] != NO_BACKBONE:
            mean, sd, backbone = row[NDCG], row[f"{NDCG} sd"] or 0.0, label(row["backbone"])
            name = f"{backbone} · {row['system']}"
            rows.append(
                {"name": name, "backbone": backbone, "value": mean, "low": mean - sd, "high": mean + sd}
            )
    base = alt.Chart(ROWS).encode(
        y=alt.Y("name:N", title=None, sort=None),
        color=alt.Color("backbone:N", legend=None),
        tooltip=tips(
            ("name:N", "system", ""),
            ("value:Q", "NDCG@5", ".4f"),
            ("low:Q", "minus sd", ".4f"),
            ("high:Q", "plus sd", ".4f"),
        ),
    )
    x = alt.X("low:Q", title="NDCG@5 ± deviation over seeds", scale=alt.Scale(zero=False))
    chart = alt.layer(
        base.mark_rule(strokeWidth=2).encode(x=x, x2="high:Q"),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            x=alt.X("value:Q", scale=alt.Scale(zero=False))
        ),
    ).add_params(zoom("x"))
    yield made(
        "means",
        "Levels: NDCG@5",
        "Means over the test lists; the axis does not begin at 0. Bars are deviations over seeds, which say "
        "nothing about other users: for differences look at what texts add.",
        "NDCG@5: " + "; ".join(f"{row['name']} {row['value']:.4f}" for row in rows),
        chart,
        rows,
        PER_ROW * len(rows) + 50,
    )


def _across_rounds(summary: Mapping[str, Any]) -> Iterator[Chart]:
    """Test NDCG@5 over the backbone, from the LLM before training through all rounds."""
    systems = {"base-llm": 0, **{f"dpo4rec-round{row['round']}": row["round"] for row in summary["rounds"]}}
    found = [
        _with_interval(row, round=systems[row["system"]], backbone=label(row["backbone"]))
        for row in summary["comparisons"]
        if row["metric"] == NDCG and row["against"] == BACKBONE and row["system"] in systems
    ]
    rows = [row for row in found if row]
    if not summary["rounds"] or not rows:
        return
    base = alt.Chart(ROWS).encode(
        x=alt.X("round:O", title="round (0: before training)", axis=alt.Axis(labelAngle=0)),
        color=colour("backbone", rows),
        xOffset="backbone:N",
        tooltip=tips(
            ("backbone:N", "backbone", ""),
            ("round:O", "round", ""),
            *interval_tips("NDCG@5 minus the backbone"),
        ),
    )
    chart = intervals(base, "y", "NDCG@5 minus the backbone", base.mark_line(opacity=0.5).encode(y="value:Q"))
    yield made(
        "across-rounds",
        "Round by round: NDCG@5",
        "What each round's texts add on test users. Which round is served was chosen on validation users, not here.",
        "NDCG@5 minus the backbone: "
        + "; ".join(f"{row['backbone']} round {row['round']} {row['value']:+.4f}" for row in rows),
        chart,
        rows,
    )


def _breakdowns(summary: Mapping[str, Any]) -> Iterator[Chart]:
    """Per kind of bucket: with one backbone all its systems, with several the texts that are served."""
    all_rows = [row for row in summary["breakdown"] if (row.get(f"{NDCG} ci95") or [None])[0] is not None]
    backbones = {row["backbone"] for row in all_rows}
    if len(backbones) > 1:
        best = summary["best_round"]
        served = {f"dpo4rec-round{best}"} if best else {"base-llm", "statistics"}
        all_rows = [row for row in all_rows if row["system"] in served]
    for kind in dict.fromkeys(row["by"] for row in all_rows):
        rows = [
            {
                "bucket": row["bucket"],
                "series": row["system"]
                if len(backbones) == 1
                else f"{label(row['backbone'])} · {row['system']}",
                "value": row[f"{NDCG} delta"],
                "low": row[f"{NDCG} ci95"][0],
                "high": row[f"{NDCG} ci95"][1],
                "lists": row["lists"],
            }
            for row in all_rows
            if row["by"] == kind
        ]
        if len({row["bucket"] for row in rows}) < 2:  # everybody is in one: nothing to tell apart
            continue
        base = alt.Chart(ROWS).encode(
            x=alt.X("bucket:N", title=BUCKETS[kind], sort=None, axis=alt.Axis(labelAngle=0)),
            xOffset="series:N",
            color=colour("series", rows),
            tooltip=tips(
                ("series:N", "system", ""),
                ("bucket:N", kind, ""),
                *interval_tips("NDCG@5 minus the backbone"),
                ("lists:Q", "lists", ","),
            ),
        )
        chart = intervals(base, "y", "NDCG@5 minus the backbone")
        yield made(
            f"by-{kind.replace(' ', '-')}",
            f"For whom: by {kind}",
            "What texts add to parts of about the same size, with 95 % intervals over users.",
            f"NDCG@5 minus the backbone by {kind}: "
            + "; ".join(f"{row['series']} {row['bucket']} {row['value']:+.4f}" for row in rows),
            chart,
            rows,
        )
