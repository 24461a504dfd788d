"""Run a recipe.

dpo4rec run RECIPE [FRAGMENT.toml ...] [section.key=value ...] [--only STAGE] [--from STAGE] [--round R] [--dry-run | --check]

Reads the recipe, starts or joins Ray, and runs the stages of dpo4rec_ray/pipeline.py. Ends with code 0, or with code 2
and one line when the recipe, the input or the machine is at fault.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dpo4rec_ray import stages
from dpo4rec_ray.cli.arguments import CHANGES, RECIPE, Formatter, examples
from dpo4rec_ray.cli.session import guarded, join, open_run, ray_job, set_up
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.storage.places import place


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, and turn the user's mistakes into one line and exit code 2."""
    options = parse(arguments)
    return guarded(lambda: run(options), options.verbose)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dpo4rec run",
        description="Run a recipe. Stages that are complete, and whose inputs and keys are the same, are kept.",
        epilog=examples(
            (
                "dpo4rec run demo run.seed=1 run.name=demo-1",
                "the whole method on the sample world, into runs/demo-1",
            ),
            ("dpo4rec run own_table data.raw_dir=FOLDER --only prepare", "what becomes of your data"),
            ("dpo4rec run demo reward.metric=ndcg@5 --dry-run", "what a change would run again, and why"),
            ("dpo4rec run ml1m --check", "whether this machine or cluster has room for every stage"),
        ),
        formatter_class=Formatter,
    )
    found.add_argument("recipe", **RECIPE)
    found.add_argument("changes", **CHANGES)
    found.add_argument(
        "--only",
        default="",
        metavar="STAGE",
        help=f"run this stage alone, even if it is complete: {', '.join(stages.NAMES)}",
    )
    found.add_argument("--from", dest="since", default="", metavar="STAGE", help="run from this stage on")
    found.add_argument(
        "--round",
        type=int,
        default=None,
        metavar="R",
        help="with --only or --from: in this round (turn, if several)",
    )
    found.add_argument(
        "--dry-run", action="store_true", help="print what would run, and why; write nothing, start nothing"
    )
    found.add_argument(
        "--check",
        action="store_true",
        help="join the cluster (or start Ray here), say whether every stage can be placed, and end",
    )
    found.add_argument(
        "--verbose", action="store_true", help="show the logs of Ray, vLLM and DeepSpeed, and tracebacks"
    )
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    return parser().parse_intermixed_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Check what costs nothing first; torch, Ray and the engines are imported after the recipe is known to be sound."""
    from dpo4rec_ray.cli.cluster import check_stages, report
    from dpo4rec_ray.config import load_config
    from dpo4rec_ray.workers.placement import joined_cluster

    config = load_config(options.recipe, options.changes)
    if options.dry_run or options.check:
        folder = place(config.run.root) / config.run.name
        set_up(Path(os.devnull), options.verbose)
    else:
        folder = open_run(config, options.verbose)
    # What is wrong on a cluster shows in seconds, before torch is loaded.
    if joined_cluster() and not options.dry_run:
        join(place(config.run.root) if options.check else folder, options.verbose)
    from dpo4rec_ray import checks
    from dpo4rec_ray.pipeline import how_far
    from dpo4rec_ray.running import Selection, check_selection, dry_run, run_pipeline
    from dpo4rec_ray.store.artifacts import RunDir

    for flag, stage in (("--only", options.only), ("--from", options.since)):
        if stage and stage not in stages.NAMES:
            raise UserError(f"{flag} {stage}: no such stage; known: {', '.join(stages.NAMES)}")
    if options.check and options.dry_run:
        raise UserError("--check and --dry-run exclude each other")
    if options.only and options.since:
        raise UserError("--only and --from exclude each other")
    if options.round is not None and not (options.only or options.since):
        raise UserError("--round needs --only or --from")
    selection = Selection(options.only, options.since, options.round)
    check_selection(config, selection)
    checks.check_all(config, options.only)
    if options.dry_run:
        dry_run(config, RunDir(folder), selection)
        return 0
    if options.check:
        join(folder, options.verbose)
        print(*report(config), sep="\n")
        return 0
    with ray_job(folder, options.verbose):
        check_stages(
            config, [options.only] if options.only else how_far(RunDir(folder), config.policy.objectives)[1]
        )
        run_pipeline(config, RunDir(folder), selection)
    return 0
