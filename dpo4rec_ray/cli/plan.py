"""dpo4rec plan RECIPE: users, tokens, time, GPU hours and storage of a run, before anything starts."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from dpo4rec_ray.cli import session
from dpo4rec_ray.cli.arguments import CHANGES, RECIPE, Formatter, examples
from dpo4rec_ray.errors import UserError

if TYPE_CHECKING:
    from dpo4rec_ray.planning.estimate import Plan, StepPlan

COUNTS = ("users", "items", "interactions", "lists")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dpo4rec plan",
        description="Reckon what a run takes, stage by stage, from the rates of finished runs or from numbers that you give. "
        "Starts nothing. What is not known is not guessed: such a stage has no time, and the last lines say so.",
        epilog=examples(
            ("dpo4rec plan demo sample.num_users=6000 --from-run runs/demo", "ten times the demo"),
            ("dpo4rec plan amazon_books --rate generate=2500 --rate encode=2500", "tokens/s of an engine"),
            (
                "dpo4rec plan own_table --users 200000 --from-run runs/trial",
                "your data, from a trial with few users",
            ),
        ),
        formatter_class=Formatter,
    )
    found.add_argument("recipe", **RECIPE)
    found.add_argument("changes", **CHANGES)
    found.add_argument(
        "--from-run",
        action="append",
        default=[],
        metavar="RUN_FOLDER",
        help="a finished run to take rates and shares from; two of different size tell start and work best apart",
    )
    found.add_argument(
        "--rate",
        action="append",
        default=[],
        metavar="STAGE=NUMBER",
        help="units (as the table has them) per second of one worker; STAGE.start=SECONDS until it works",
    )
    for name in COUNTS:
        found.add_argument(
            f"--{name}", type=int, metavar="N", help=f"{name} of the prepared data, where you know them"
        )
    found.add_argument("--cpus", type=float, metavar="N", help="of all nodes; default: this machine's")
    found.add_argument(
        "--gpus", type=float, metavar="N", help="of all nodes; default: as many as a stage asks for"
    )
    found.add_argument("--json", action="store_true", help="one object, for programs")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    return session.guarded(lambda: show(options), verbose=False)


def show(options: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        UserError: sizes are not known, a rate or a number of CPUs or GPUs is none, or a run cannot be read.
    """
    from dpo4rec_ray.config import load_config, read_config

    config = load_config(options.recipe, options.changes)
    given = {name: value for name in COUNTS if (value := getattr(options, name)) is not None}
    for name, value in given.items():
        if value < 1:
            raise UserError(f"--{name} {value}: must be 1 or more")
    cpus, gpus = options.cpus, options.gpus
    if cpus is not None and not (math.isfinite(cpus) and cpus > 0):
        raise UserError(f"--cpus {cpus:g}: must be a number above 0")
    if gpus is not None and not (math.isfinite(gpus) and gpus >= 0):
        raise UserError(f"--gpus {gpus:g}: must be a number, 0 or more")
    rates = dict(map(_rate, options.rate))
    from dpo4rec_ray.planning import estimate
    from dpo4rec_ray.planning.sizes import sizes_of_recipe
    from dpo4rec_ray.planning.work import Machine
    from dpo4rec_ray.store.artifacts import RunDir

    runs = [estimate.FinishedRun.open(read_config(folder), RunDir(folder)) for folder in options.from_run]
    largest = max(runs, key=lambda run: run.sizes.users, default=None)
    sizes = sizes_of_recipe(config, given, (largest.config, largest.sizes) if largest else None)
    generate = config.generate
    wanted = (
        generate.num_engines
        * generate.gpus_per_engine
        * generate.tensor_parallel_size
        * generate.pipeline_parallel_size,
        config.policy.num_workers * config.policy.gpus_per_worker,
    )
    machine = Machine(cpus or os.cpu_count() or 1, max(wanted) if gpus is None else gpus)
    found = estimate.with_given(estimate.rates_of_runs(runs, machine), rates)
    planned = estimate.plan(config, sizes, found, machine, runs)
    print(json.dumps(planned.as_dict(), indent=1) if options.json else "\n".join(lines(planned)))
    return 0


def _rate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--rate {text}: not STAGE=NUMBER, such as generate=2500")
    return name, number


def lines(planned: Plan) -> Iterator[str]:
    """For a terminal: the sizes, a line per stage, the sums, and what was assumed."""
    sizes = planned.sizes
    yield f"{'users':<16}{sizes.users:,} (train {sizes.train:,}, valid {sizes.valid:,}, test {sizes.test:,})"
    for name in ("items", "interactions", "lists"):
        yield f"{name:<16}{getattr(sizes, name):,}"
    tokens = f"; tokens: {planned.prompt_tokens:,} of prompts, {planned.text_tokens:,} generated"
    yield f"{'texts':<16}{planned.texts:,}" + (tokens if planned.text_tokens else "; no LLM writes them")
    yield ""
    yield (
        f"{'stage':<16}{'work':>26}{'workers':>9}{'GPUs':>7}{'rate':>12}{'start':>9}{'time':>17}{'GPU h':>9}{'storage':>10}"
    )
    yield from map(_row, planned.steps)
    seconds = timedelta(seconds=round(planned.seconds))
    yield f"{'sum':<16}{'':>63}{seconds!s:>17}{planned.gpu_hours:>9.1f}{_size(planned.bytes):>10}"
    yield ""
    yield "assumed:"
    yield from (f"- {one}" for one in planned.assumed)


def _row(step: StepPlan) -> str:
    work, rate = step.work, step.rate
    shown = [
        f"{f'{step.stage}({step.round})':<16}",
        f"{f'{work.amount:,.0f} {work.unit}':>26}",
        f"{work.workers:>9.3g}",
        f"{work.gpus:>7.3g}",
        f"{f'{_number(rate.per_s)}/s' if rate else '?':>12}",
        f"{f'{rate.start_s:,.1f} s' if rate else '?':>9}",
        f"{'?' if step.seconds is None else str(timedelta(seconds=round(step.seconds))):>17}",
        f"{'?' if step.gpu_hours is None else f'{step.gpu_hours:.1f}':>9}",
        f"{'?' if step.bytes is None else _size(step.bytes):>10}",
    ]
    return "".join(shown)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
