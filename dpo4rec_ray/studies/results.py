"""What a study comes to: study.json, study.md and study.svg in its folder."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
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
    "so they say what other users would change, not other seeds. Differences are paired on users or lists. The reward rerankers "
    "of the recipe's own run judge all variants' texts of the validation users; gains are since the base LLM's texts."
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
    text = markdown(name, sentence, seeds, rows, stages, jobs)
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
                NOTE,
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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width, height = 3.2 * len(study.shown) + 2.5, 0.4 * len(rows) + 1.2
    figure, axes = pyplot.subplots(
        1, len(study.shown), figsize=(width, height), layout="constrained", sharey=True, squeeze=False
    )
    names = [str(row[NAME]) for row in rows]
    for axis, column in zip(axes[0], study.shown, strict=True):
        for place, row in enumerate(rows):
            if isinstance(cell := row.get(column), Measured):
                found = cell.interval
                ends = np.nan_to_num([[found.mean - found.low], [found.high - found.mean]])
                axis.errorbar([found.mean], [place], xerr=ends, fmt="o", color="tab:blue", capsize=3)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(column, fontsize=10)
        axis.set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    pyplot.close(figure)
    return buffer.getvalue()
