"""Run a recipe.

python jobs/run.py RECIPE.toml [FRAGMENT.toml ...] [section.key=value ...] [--only STAGE] [--from STAGE] [--round R]

Reads the recipe, starts or joins Ray, and runs the stages of dpo4rec_ray/pipeline.py. Ends with code 0, or with code 2
and one line when the recipe, the input or the machine is at fault.
"""

from __future__ import annotations

import argparse

from dpo4rec_ray.cli.session import guarded, open_run, ray_job
from dpo4rec_ray.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, and turn the user's mistakes into one line and exit code 2."""
    options = parse(arguments)
    return guarded(lambda: run(options), options.verbose)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="jobs/run.py", description="Run a DPO4Rec recipe; finished stages are skipped."
    )
    parser.add_argument("recipe", help="a TOML file, see jobs/recipes/")
    parser.add_argument(
        "changes",
        nargs="*",
        metavar="FRAGMENT.toml | section.key=value",
        help="values that replace the recipe's: first those of TOML files, such as a search's found.toml, in order, "
        "then single ones",
    )
    parser.add_argument(
        "--only", default="", metavar="STAGE", help="run this stage alone, even if it is complete"
    )
    parser.add_argument("--from", dest="since", default="", metavar="STAGE", help="run from this stage on")
    parser.add_argument(
        "--round", type=int, default=None, metavar="R", help="with --only or --from: in this round"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="show the logs of Ray, vLLM and DeepSpeed, and tracebacks"
    )
    return parser.parse_intermixed_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Check what costs nothing first; torch, Ray and the engines are imported after the recipe is known to be sound."""
    from dpo4rec_ray.config import load_config

    config = load_config(options.recipe, options.changes)
    folder = open_run(config, options.verbose)
    from dpo4rec_ray import checks
    from dpo4rec_ray.pipeline import STAGE_NAMES, Selection, check_selection, run_pipeline
    from dpo4rec_ray.store.artifacts import RunDir

    for flag, stage in (("--only", options.only), ("--from", options.since)):
        if stage and stage not in STAGE_NAMES:
            raise UserError(f"{flag} {stage}: no such stage; known: {', '.join(STAGE_NAMES)}")
    if options.only and options.since:
        raise UserError("--only and --from exclude each other")
    if options.round is not None and not (options.only or options.since):
        raise UserError("--round needs --only or --from")
    selection = Selection(options.only, options.since, options.round)
    check_selection(config, selection)
    checks.check_all(config, options.only)
    with ray_job(folder, options.verbose):
        run_pipeline(config, RunDir(folder), selection)
    return 0
