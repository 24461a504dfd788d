"""dpo4rec study NAME RECIPE: a recipe and its variants, each run from what is there already, and what they show.

Works in RUN-study-NAME beside the recipe's own run folder, and writes study.json, study.md and study.svg there. Killed or
interrupted, the same command goes on: finished runs are kept, and the others go on where they were.
"""

from __future__ import annotations

import argparse

from dpo4rec_ray.cli import session
from dpo4rec_ray.cli.arguments import CHANGES, RECIPE, Formatter, examples
from dpo4rec_ray.errors import UserError, nearest
from dpo4rec_ray.studies.every_study import QUESTIONS, run_name, study_of


def parser() -> argparse.ArgumentParser:
    width = max(map(len, QUESTIONS))
    listed = "\n".join(f"  {name:<{width}}  {question}" for name, question in QUESTIONS.items())
    found = argparse.ArgumentParser(
        prog="dpo4rec study",
        description="Run a recipe and variants of it, each from the artifacts that the recipe's own run can lend it, and say "
        "what they show: a table, a plot, one sentence with intervals, and JSON.",
        epilog=f"studies:\n{listed}\n\n"
        + examples(
            ("dpo4rec study ablation demo", "the demo and its ablation, into runs/demo-study-ablation"),
            ("dpo4rec study n_samples demo --seeds 0,1,2", "the means over three seeds"),
            ("dpo4rec study ablation demo --jobs 2", "two variants at a time, where there is room for both"),
        ),
        formatter_class=Formatter,
    )
    found.add_argument("name", metavar="NAME", help="of a study, below")
    found.add_argument("recipe", **RECIPE)
    found.add_argument("changes", **CHANGES)
    found.add_argument("--seeds", default="", metavar="S,S", help="values of run.seed; default: the recipe's")
    found.add_argument(
        "--variant",
        dest="variants",
        action="append",
        default=[],
        metavar="NAME",
        help="run this one, and those that the study needs; may be repeated; default: all",
    )
    found.add_argument("--jobs", type=int, default=1, metavar="K", help="variants at a time; default: 1")
    found.add_argument("--verbose", action="store_true", help="show the logs of libraries, and tracebacks")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; the user's mistakes become one line and exit code 2."""
    options = parser().parse_intermixed_args(arguments)
    return session.guarded(lambda: run(options), options.verbose)


def run(options: argparse.Namespace) -> int:
    """Check every variant's recipe first; then run them, measure, and write what was found.

    Raises:
        UserError: an unknown study, options out of range, or as `studies.variant_jobs`.
    """
    if options.name not in QUESTIONS:
        raise UserError(f"no study {options.name!r}{nearest(options.name, list(QUESTIONS))}")
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: must be 1 or more")
    seeds = _seeds(options.seeds)
    from dpo4rec_ray.config import load_config

    config = load_config(options.recipe, options.changes)
    study_run = config.run.model_copy(update={"name": run_name(config.run.name, options.name)})
    folder = session.open_run(config.model_copy(update={"run": study_run}), options.verbose)
    from dpo4rec_ray.studies import results, variant_jobs

    study = study_of(options.name)
    jobs = variant_jobs.planned(options.name, study, options.recipe, options.changes, seeds, options.variants)
    with session.locked(folder):
        runs = variant_jobs.run_jobs(jobs, options.jobs)
        text = results.write(options.name, study, folder, jobs, study.rows(runs))
    print(text, end="")
    print(f"study: {folder / 'study.md'}, {folder / 'study.json'}")
    return 0


def _seeds(text: str) -> list[int]:
    """Raises UserError unless they are whole numbers from 0, none twice."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"--seeds {text}: write different whole numbers, such as 0,1,2")
    return [int(part) for part in parts]
