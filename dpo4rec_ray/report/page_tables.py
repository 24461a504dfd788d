"""The tables of the report: their columns, and rows of text that is short enough to read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo4rec_ray.evaluation.heldout_texts import LABELS
from dpo4rec_ray.evaluation.paper_table import layout
from dpo4rec_ray.evaluation.systems import HEADLINE, PRINTED, TITLES, Row, label

DASH = "–"
WATCHED = {
    "reward": "reward",
    "reading": "reading",
    "style": "style",
    "words": "words",
    "distinct": "distinct texts",
}


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        key: its id.
        columns: headings; the first `names` of them are of names, the others of numbers.
        rows: a cell of text per column.
        note: what it says, below it.
    """

    key: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1
    note: str = ""


def number(value: float | None, form: str = ".4f") -> str:
    """A number, or a dash where there is none, such as the share that carries over of a reward that always ties."""
    return DASH if value is None or math.isnan(value) else format(value, form)


def signed(value: float | None) -> str:
    return number(value, "+z.4f")


def percent(value: float | None) -> str:
    return number(value, ".1%")


def interval(ends: Sequence[float | None] | None) -> str:
    if ends is None or any(end is None or math.isnan(end) for end in ends):
        return DASH
    return "[{:+z.4f}, {:+z.4f}]".format(*ends)


def shown(value: Any) -> str:
    """Any value of the summary as a cell."""
    if value is None or isinstance(value, float):
        return DASH if value is None or math.isnan(value) else format(value, ".4g")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or DASH
    return str(value)


def of_test_users(summary: Mapping[str, Any]) -> list[Table]:
    """Systems, differences, the paper's Table I, whether validation wants the texts, and the breakdown."""
    return [
        table
        for table in (
            _systems(summary["systems"]),
            _differences(summary["comparisons"]),
            _table_one(summary),
            _use(summary.get("use_of_texts", [])),
            _breakdown(summary["breakdown"]),
        )
        if table.rows
    ]


def _systems(rows: Sequence[Row]) -> Table:
    def cell(row: Row, name: str) -> str:
        sd = row[f"{name} sd"]
        return number(row[name]) + ("" if sd is None else f" ± {number(sd)}")

    metrics = (*PRINTED, *(f"{name} by user" for name in HEADLINE))
    return Table(
        "systems",
        "Every system on the test lists",
        ["system", "backbone", *(_title(name) for name in metrics), "seeds", "lists"],
        [
            [
                row["system"],
                label(row["backbone"]) or DASH,
                *(cell(row, name) for name in metrics),
                shown(row["seeds"]),
                shown(row["lists"]),
            ]
            for row in rows
        ],
        2,
        "Means over lists, ± standard deviation over seeds. MAP@5 divides by the positives found in the top 5, as the paper "
        "does; map@5 by all that could be there.",
    )


def _title(metric: str) -> str:
    name, _, how = metric.partition(" ")
    return f"{TITLES.get(name, name)} {how}".rstrip()


def _differences(rows: Sequence[Row]) -> Table:
    found = [
        [
            f"{row['system']} minus {row['against']}",
            label(row["backbone"]),
            TITLES[row["metric"]],
            signed(row["delta"]),
            interval(row["ci95"]),
            number(row["p_value"], ".3f"),
            number(row["delta sd"]),
            signed(row["by user delta"]),
            interval(row["by user ci95"]),
        ]
        for row in rows
        if row["metric"] in HEADLINE
    ]
    heads = [
        "difference",
        "backbone",
        "metric",
        "over lists",
        "95 %",
        "p",
        "sd of seeds",
        "over users",
        "95 % over users",
    ]
    note = "Intervals and p-values resample users, and are not corrected for the number of comparisons."
    return Table("differences", "Differences on identical lists", heads, found, 3, note)


def _table_one(summary: Mapping[str, Any]) -> Table:
    paper = summary.get("paper")
    rows = []
    for row in layout(summary["systems"], summary["comparisons"], paper):
        places = ".4f" if row["source"] == "run" else ".5f"  # as many as the paper prints
        cells = [
            row["method"],
            label(row["backbone"]) or DASH,
            "this run" if row["source"] == "run" else "paper",
        ]
        for name in HEADLINE:
            cells += [number(row[name], places), number(row[f"{name} delta"], f"+z{places}")]
        rows.append(cells)
    heads = [
        "method",
        "backbone",
        "source",
        *(head for name in HEADLINE for head in (TITLES[name], f"Δ {TITLES[name]}")),
    ]
    note = "Δ: minus the backbone of the same source. "
    if paper:
        note += (
            f"Rows of the paper: arXiv 2410.05939, Table I, {paper}. Its protocol and lists differ: the differences compare, "
            "not the levels."
        )
    else:
        note += "The data of this run is none of the paper's, so none of its rows stand here."
    return Table("table-1", "Table I of the paper, for this run", heads, rows, 3, note)


def _use(rows: Sequence[Row]) -> Table:
    found = [
        [row["system"], label(row["backbone"]), f"{row['used']} of {row['fits']}", signed(row["gain"])]
        for row in rows
    ]
    note = "Where validation lists show no gain of the texts, a reranker leaves them out and ranks as its backbone."
    heads = ["system", "backbone", "fits that use the texts", "gain on validation, NDCG@5"]
    return Table("use", "Do the rerankers want the texts?", heads, found, 2, note)


def _breakdown(rows: Sequence[Row]) -> Table:
    found = []
    for row in rows:
        cells = [row["by"], row["bucket"], row["system"], label(row["backbone"]) or DASH]
        for name in HEADLINE:
            cells += [number(row[name]), signed(row[f"{name} delta"]), interval(row[f"{name} ci95"])]
        found.append([*cells, shown(row["lists"]), shown(row["users"])])
    columns = [head for name in HEADLINE for head in (TITLES[name], f"Δ {TITLES[name]}", "95 %")]
    heads = ["by", "range", "system", "backbone", *columns, "lists", "users"]
    note = (
        "Thirds of the users by length of their history and by number of lists; thirds of the lists by popularity of what is "
        "liked in them. Δ: minus the backbone."
    )
    return Table("breakdown", "For whom: by history, lists and popularity", heads, found, 4, note)


def of_reward(round_id: str, stats: Mapping[str, Any]) -> list[Table]:
    """Whether a round's reward is worth following, by every metric that was compared."""
    rows = [
        [
            name,
            percent(row["best tied"]),
            number(row["gap_in_sample"]),
            number(row["gap_held_out"]),
            interval(row["gap_held_out_ci95"]),
            percent(row["carried"]),
            number(row["shrunk_gap"]),
            signed(row["yardstick_gap"]),
            interval(row["yardstick_gap_ci95"]),
        ]
        for name, row in stats.get("metrics", {}).items()
    ]
    heads = [
        "chosen by",
        "best tied",
        "gap, same lists",
        "gap, other lists",
        "95 %",
        "carried over",
        "shrunk gap",
        "NDCG@5 gap, lists as drawn",
        "95 % of it",
    ]
    agreement = [[pair, number(value, ".2f")] for pair, value in stats.get("agreement", {}).items()]
    found = [
        Table(
            f"reward-{round_id}",
            f"Is the reward of round {round_id} worth following?",
            heads,
            rows,
            note="The best and the worst text are chosen on half of a user's lists; what is left of their gap on the other half "
            "carries over.",
        ),
        Table(
            f"agreement-{round_id}",
            f"Do the metrics agree? Round {round_id}",
            ["metrics", "rank correlation of a user's texts"],
            agreement,
        ),
    ]
    return [table for table in found if table.rows]


def of_round(row: Mapping[str, Any]) -> list[Table]:
    """The texts of held-out users before and after, the turns, and the counts of a round."""
    number_of = row["round"]
    figures = [
        [
            name,
            number(one["before"]),
            number(one["after"]),
            signed(one["change"]),
            interval(one["change_ci95"]),
        ]
        for key, name in LABELS.items()
        if (one := row["figures"].get(key))
    ]
    found = [
        Table(
            f"figures-{number_of}",
            f"Round {number_of}: texts of {shown(row['heldout_users'])} validation users",
            ["figure", "before", "after", "change", "95 % over users"],
            figures,
        ),
        _turns(number_of, row.get("turns", [])),
        Table(
            f"counts-{number_of}",
            f"Round {number_of}: counts and training",
            ["what", "value"],
            list(_counts(row)),
        ),
    ]
    return [table for table in found if table.rows]


def _turns(round_id: int, turns: Sequence[Row]) -> Table:
    rows = []
    for turn in turns:
        cells = [
            shown(turn["turn"]),
            turn["objective"],
            *(shown(turn[name]) for name in ("users", "steps", "mean_reward", "spread")),
        ]
        for name in WATCHED:
            one = turn["watched"].get(name)
            cells.append(f"{signed(one['change'])} {interval(one['change_ci95'])}" if one else DASH)
        rows.append(cells)
    heads = ["turn", "learner", "users", "steps", "mean reward", "spread", *WATCHED.values()]
    note = "From reward on: change of the texts of the watched users since the round began, with its 95 % interval."
    return Table(
        f"turns-{round_id}",
        f"Round {round_id}, turn by turn: watched users since the round began",
        heads,
        rows,
        2,
        note,
    )


def _counts(row: Mapping[str, Any]) -> Iterable[list[str]]:
    for name in ("users", "samples", "pairs"):
        yield [name, shown(row[name])]
    for group, title in (
        ("failed", "no text"),
        ("dropped", "no pair"),
        ("generation", "texts"),
        ("training", "training"),
        ("diagnosis", "diagnosis"),
    ):
        for key, value in row.get(group, {}).items():
            if not isinstance(value, Mapping) and key != "warnings":
                yield [f"{title}: {key.replace('_', ' ')}", shown(value)]


def of_stages(rows: Sequence[Row]) -> Table:
    """Time, tokens, GPU hours and cost per stage, and their sums. A column that no stage has a value for is left out."""
    always = [
        ("stage", [row["stage"] for row in rows]),
        ("this job", ["kept" if row["skipped"] else "run" for row in rows]),
        ("turn", [shown(row["round"]) for row in rows]),
        ("seconds", [number(row["seconds"], ",.1f") for row in rows]),
        ("rows in", [shown(row["rows_in"]) for row in rows]),
        ("rows out", [shown(row["rows_out"]) for row in rows]),
    ]
    found = [
        (head, [number(row[name], form) for row in rows])
        for head, name, form in (
            ("tokens written", "tokens", ",.0f"),
            ("tokens/s", "tokens_per_s", ",.0f"),
            ("GPUs held", "gpus", "g"),
            ("GPU hours", "gpu_hours", ".3f"),
            ("cost of endpoint", "cost", ",.4f"),
        )
        if any(row[name] for row in rows)
    ]
    columns = always + found
    heads = [head for head, _ in columns]
    cells = [list(row) for row in zip(*(own for _, own in columns), strict=True)]
    sums = {name: sum(row[name] or 0 for row in rows) for name in ("seconds", "gpu_hours", "cost")}
    note = f"In sum {sums['seconds']:,.0f} s"
    if sums["gpu_hours"]:
        note += f", {sums['gpu_hours']:.3f} GPU hours of GPUs that stages hold, busy or not"
    if sums["cost"]:
        note += f", and {sums['cost']:,.4f} for an endpoint's tokens"
    note += ". Kept stages show what they took when they ran."
    return Table("stages", "Stages", heads, cells, 2, note)
