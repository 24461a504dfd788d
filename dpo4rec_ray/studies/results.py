"""What a study comes to: study.json, study.md and study.svg in its folder."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from dpo4rec_ray.core.intervals import Interval
from dpo4rec_ray.storage.places import Place, write_bytes, write_text
from dpo4rec_ray.store.artifacts import write_json
from dpo4rec_ray.store.versions import commit, versions
from dpo4rec_ray.studies.every_study import QUESTIONS
from dpo4rec_ray.studies.study_parts import NAME, RECIPE, Cell, Measured, Row, Study, said
from dpo4rec_ray.studies.variant_jobs import Job
from dpo4rec_ray.studies.variants import kept_and_redone, stage_names

NOTE = (
    "Intervals are 95 % bootstraps over users; with several seeds a mean over seeds whose users are drawn anew within each seed, "
    "so they say what other users would change, not other seeds. Differences are paired on users or lists. What the texts of "
    "validation users are worth is judged by {}, since the base LLM's texts."
)
KEPT = "What the variants kept of the recipe's run"


def write(name: str, study: Study, folder: Place, jobs: Sequence[Job], rows: Sequence[Row]) -> str:
    """Write all files; returns the Markdown."""
    sentence, stages = study.sentence(rows), stages_of(jobs)
    seeds = sorted({job.seed for job in jobs})
    write_json(
        folder / "study.json",
        {
            "study": name,
            "question": QUESTIONS[name],
            "reading": sentence,
            "seeds": seeds,
            "rows": [{column: as_json(cell) for column, cell in row.items()} for row in rows],
            "stages": stages,
            "commands": {f"{job.name}, seed {job.seed}": job.command for job in jobs},
            "commit": commit(),
            "versions": versions(),
        },
    )
    text = markdown(name, study.judged_by, sentence, seeds, rows, stages, jobs)
    write_text(folder / "study.md", text)
    write_bytes(folder / "study.svg", plot(study, rows))
    return text


def as_json(cell: Cell) -> Any:
    """An interval as its numbers, over all seeds and of each."""
    if not isinstance(cell, Measured):
        return cell
    return {**_numbers(cell.interval), "by_seed": [_numbers(one) for one in cell.by_seed]}


def _numbers(found: Interval) -> dict[str, Any]:
    return {"mean": found.mean, "ci95": [found.low, found.high], "p_value": found.p_value}


def stages_of(jobs: Sequence[Job]) -> dict[str, dict[str, str]]:
    """ "variant, seed S" -> step -> kept or redone."""
    bases = {job.seed: job.store for job in jobs if job.name == RECIPE}
    return {
        f"{job.name}, seed {job.seed}": kept_and_redone(job.config, bases[job.seed], job.store)
        for job in jobs
        if job.name != RECIPE
    }


def markdown(
    name: str,
    judged_by: str,
    sentence: str,
    seeds: Sequence[int],
    rows: Sequence[Row],
    stages: Mapping[str, Mapping[str, str]],
    jobs: Sequence[Job],
) -> str:
    """The whole study as one page."""
    told = [{column: said(cell) for column, cell in row.items()} for row in rows]
    steps = [{NAME: run, **_by_stage(found)} for run, found in stages.items()]
    return (
        "\n\n".join(
            [
                f"# Study {name}",
                f"{QUESTIONS[name]} Seeds: {', '.join(map(str, seeds))}.",
                f"**{sentence}**",
                _table(told),
                "![The table as a plot](study.svg)",
                NOTE.format(judged_by),
                f"## {KEPT}",
                _table(steps),
                "## Commands",
                "```sh\n" + "\n".join(job.command for job in jobs) + "\n```",
            ]
        )
        + "\n"
    )


def _by_stage(found: Mapping[str, str]) -> dict[str, str]:
    """Stage -> what became of it, in all its turns."""
    told: dict[str, str] = {}
    for stage in stage_names():
        states = {step: state for step, state in found.items() if step.partition("(")[0] == stage and state}
        if len(set(states.values())) > 1:
            told[stage] = ", ".join(f"{step}: {state}" for step, state in states.items())
        elif states:
            told[stage] = next(iter(states.values()))
    return told


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    return pd.DataFrame(list(rows)).fillna("").to_markdown(index=False, disable_numparse=True)


def plot(study: Study, rows: Sequence[Row]) -> bytes:
    """One panel per column in `study.shown`: a dot with its interval for each row. SVG."""
    import altair as alt

    found = [
        {"row": str(row[NAME]), "figure": column, "mean": cell.interval.mean}
        | {"low": cell.interval.low, "high": cell.interval.high}
        for row in rows
        for column in study.shown
        if isinstance(cell := row.get(column), Measured)
    ]
    base = alt.Chart(pd.DataFrame(found)).encode(
        y=alt.Y("row:N", sort=[str(row[NAME]) for row in rows], title=None, axis=alt.Axis(labelLimit=300))
    )
    zero = base.mark_rule(color="grey", strokeDash=[3, 3]).encode(x=alt.datum(0), y=alt.Y())
    ends = base.mark_rule().encode(x=alt.X("low:Q", title=None), x2="high:Q")
    dots = base.mark_point(filled=True, size=50).encode(x="mean:Q")
    panels = (
        (zero + ends + dots)
        .properties(width=220)
        .facet(column=alt.Column("figure:N", sort=list(study.shown), title=None))
    )
    buffer = io.StringIO()
    panels.resolve_scale(x="independent").save(buffer, format="svg")
    return buffer.getvalue().encode()
