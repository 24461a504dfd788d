"""Plans against runs: a small run of the sample world, or two, and what `dpo4rec plan` makes of them for one ten times larger.

python benchmarks/bench.py plan --small 300,600 --large 3000 --recipe demo [section.key=value ...]. Complete runs in the folder
are kept, so that a changed planner needs no new ones.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import harness
from harness import Row

from dpo4rec_ray.config import load_config, read_config
from dpo4rec_ray.pipeline import STAGES
from dpo4rec_ray.planning import estimate
from dpo4rec_ray.planning.sizes import sizes_of_recipe
from dpo4rec_ray.planning.work import Machine
from dpo4rec_ray.store.artifacts import RunDir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("changes", nargs="*", metavar="section.key=value")
    parser.add_argument("--recipe", default="demo", help="on the sample world")
    parser.add_argument("--small", default="300", help="users of the runs that rates are taken from")
    parser.add_argument(
        "--large", type=int, default=3000, help="users of the run that is planned, and then made"
    )


def run(options: argparse.Namespace, folder: Path) -> int:
    small = [int(users) for users in options.small.split(",")]
    for users in (*small, options.large):
        own = [f"sample.num_users={users}", f"run.root={folder}", f"run.name=plan-{users}"]
        harness.run("-m", "dpo4rec_ray", "run", options.recipe, *options.changes, *own)
    machine = Machine(os.cpu_count() or 1, 0)
    runs = [
        estimate.FinishedRun.open(read_config(one), RunDir(one))
        for one in (folder / f"plan-{users}" for users in small)
    ]
    like = max(runs, key=lambda one: one.sizes.users)
    config = load_config(options.recipe, [*options.changes, f"sample.num_users={options.large}"])
    sizes = sizes_of_recipe(config, {}, (like.config, like.sizes))
    planned = estimate.plan(config, sizes, estimate.rates_of_runs(runs, machine), machine, runs)
    rows = list(_rows(planned, RunDir(folder / f"plan-{options.large}")))
    rows.sort(key=lambda row: -abs(row["error"]))  # misses first
    total = {"stage": "all", **{name: sum(row[name] for row in rows) for name in ("planned", "took")}}
    rows.append(total | {"error": total["planned"] / total["took"] - 1})
    harness.print_table(
        rows, "stage {stage} | planned s {planned:.1f} | took s {took:.1f} | error {error:+.0%}"
    )
    harness.write_results(folder / "plan.json", rows)
    return 0


def _rows(planned: estimate.Plan, made: RunDir) -> list[Row]:
    found = []
    for step in planned.steps:
        manifest = made.require(*STAGES[step.stage].writes(step.round)[-1])
        if step.seconds is not None and manifest.seconds:
            row = {"stage": f"{step.stage}({step.round})", "planned": step.seconds, "took": manifest.seconds}
            found.append(row | {"error": step.seconds / manifest.seconds - 1})
    return found
