"""Runs side by side as Markdown, for the terminal and files, and as one HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader

from dpo4rec_ray.core.intervals import signed
from dpo4rec_ray.evaluation.run_comparison import (
    HELD_OUT,
    ComparedRun,
    differences,
    held_out,
    recipe_differences,
)
from dpo4rec_ray.evaluation.systems import HEADLINE, TITLES, Row, label
from dpo4rec_ray.evaluation.table_formats import interval
from dpo4rec_ray.evaluation.verdict import BASE_LLM, STATISTICS
from dpo4rec_ray.store.dependencies import short

Table = tuple[str, list[str], list[list[str]]]  # heading, columns, rows


def claims(runs: Sequence[ComparedRun]) -> list[str]:
    """What the page says first: of each later run and backbone, whether its texts are better on test users than the first's.

    The texts of a run are those of its best round. They are compared where the first run's are of the same round.
    """
    first, found = runs[0], []
    rows = [row for row in differences(runs) if row["metric"] == HEADLINE[1] and "delta" in row]
    for run in runs[1:]:
        own = [row for row in rows if (row["run"], row["system"]) == (run.name, _judged(run))]
        if _judged(run) != _judged(first) or not own:
            found.append(
                f"{run.name} ({_judged(run)}) and {first.name} ({_judged(first)}) have no difference here."
            )
            continue
        for row in own:
            low, high = (math.nan if end is None else end for end in row["ci95"])
            than = "better" if low > 0 else "worse" if high < 0 else "not measurably better or worse"
            found.append(
                f"{run.name} is {than} than {first.name}: {TITLES[row['metric']]} of {_judged(run)} with "
                f"{label(row['backbone'])} {_difference(row, '')}."
            )
    if len({run.summary.get("commit") for run in runs}) > 1:
        found.append("The runs are of different commits: not only their recipes may differ.")
    return found


def _judged(run: ComparedRun) -> str:
    """The system whose texts a run is judged by, as in its verdict."""
    best, source = run.summary["best_round"], run.summary.get("generator")
    return f"dpo4rec-round{best}" if best else STATISTICS if source == STATISTICS else BASE_LLM


def tables(runs: Sequence[ComparedRun]) -> list[Table]:
    """What is shown: the runs, their recipes' differences, test users, held-out users."""
    names = [run.name for run in runs]
    about = [
        [run.name, str(run.summary.get("commit", ""))[:12], f"{run.summary['total_seconds']:.0f}", _best(run)]
        for run in runs
    ]
    changed = [[f"`{key}`", *map(short, values)] for key, values in recipe_differences(runs).items()]
    test = [
        [
            label(row["backbone"]),
            row["system"],
            TITLES[row["metric"]],
            row["run"],
            f"{row['level']:.4f}",
            _difference(row, ""),
            _difference(row, "by user "),
        ]
        for row in _without_equals(differences(runs))
    ]
    rounds = [
        [
            row["run"],
            str(row["round"]),
            "yes" if row["kept"] else "no",
            *(_change(row[name]) for name in HELD_OUT.values()),
        ]
        for row in held_out(runs)
    ]
    against = f"against {names[0]}, over lists"
    found: list[Table] = [
        ("Runs", ["run", "commit", "seconds of the last job", "best round"], about),
        ("What their recipes differ in", ["key", *names], changed),
        (
            "Test users, on identical lists",
            ["backbone", "system", "metric", "run", "mean", against, "over users"],
            test,
        ),
        (
            "Validation users' texts in each run's last round, by its own rerankers",
            ["run", "round", "kept", *HELD_OUT.values()],
            rounds,
        ),
    ]
    return [table for table in found if table[2]]


def to_markdown(runs: Sequence[ComparedRun]) -> str:
    parts = ["\n".join(f"- {claim}" for claim in claims(runs))]
    for heading, columns, rows in tables(runs):
        frame = pd.DataFrame(rows, columns=columns)
        parts += [f"## {heading}", frame.to_markdown(index=False, disable_numparse=True)]
    return "\n\n".join([*parts, NOTE]) + "\n"


NOTE = (
    "[Brackets] are 95 % intervals over users: one that includes 0 shows nothing. Differences are paired on lists and seeds; "
    "p-values are not corrected for the number of comparisons. A system whose figures are the same in all runs stands once, as "
    '"all". Figures of validation users are by each run\'s own rerankers, and compare as far as those are the same.'
)


def to_html(runs: Sequence[ComparedRun]) -> str:
    """A page of its own: no network, no script."""
    environment = Environment(loader=PackageLoader("dpo4rec_ray", "report"), autoescape=True)
    template = environment.get_template("comparison.html.jinja")
    return template.render(
        names=[run.name for run in runs], claims=claims(runs), tables=tables(runs), note=NOTE
    )


def _without_equals(rows: Sequence[Row]) -> list[Row]:
    """A system whose figures are the same to the last digit in all its runs is one row, of "all"."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["backbone"], row["system"]), []).append(row)
    shown: list[Row] = []
    for own in found.values():
        levels: dict[str, set[float]] = {}
        for row in own:
            levels.setdefault(row["metric"], set()).add(row["level"])
        several = len({row["run"] for row in own}) > 1
        if several and all(len(values) == 1 for values in levels.values()):
            shown += [{**row, "run": "all"} for row in own if row["run"] == own[0]["run"]]
        else:
            shown += own
    return shown


def _best(run: ComparedRun) -> str:
    return str(run.summary["best_round"]) if run.summary.get("rounds") else "no rounds"


def _difference(row: Row, prefix: str) -> str:
    return interval(row, prefix) if f"{prefix}delta" in row else ""


def _change(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    return signed(figure["change"], figure["change_ci95"])
