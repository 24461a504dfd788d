"""Search a recipe's training settings of each backbone, on the validation lists.

dpo4rec search RECIPE [FRAGMENT.toml ...] [section.key=value ...] [--backbones dlcm,prm]
    [--knowledge none|base] [--trials N] [--scheduler asha|none] [--concurrent C] [--seed S]

Works in the recipe's run folder, where it runs the stages prepare and, with knowledge, encode(0) unless they are complete.
Writes search/results.csv, results.md and found.toml there; `dpo4rec run RECIPE RUN/search/found.toml` uses what was
found. Ends like `dpo4rec run`: code 2 and one line for a user's mistake. A search that was interrupted is not continued: the
same command searches from the start, and keeps the finished stages.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from dpo4rec_ray.cli import session
from dpo4rec_ray.cli.arguments import CHANGES, RECIPE, Formatter, examples
from dpo4rec_ray.errors import UserError

if TYPE_CHECKING:
    from dpo4rec_ray.config import Config
    from dpo4rec_ray.store.artifacts import RunDir


def main(arguments: list[str] | None = None) -> int:
    """Parse and search; the user's mistakes become one line and exit code 2."""
    options = parse(arguments)
    return session.guarded(lambda: run(options), options.verbose)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dpo4rec search",
        description="Search the paper's grid of training settings on the validation lists.",
        epilog="The run folder's search/ holds the results of the last search alone; copy found.toml to keep it.\n\n"
        + examples(
            ("dpo4rec search demo --trials 8", "eight settings of each backbone that the recipe evaluates"),
            ("dpo4rec search demo --backbones dlcm,prm --knowledge base", "with the base LLM's texts"),
            ("dpo4rec run demo runs/demo/search/found.toml", "use what was found"),
        ),
        formatter_class=Formatter,
    )
    found.add_argument("recipe", **RECIPE)
    found.add_argument("changes", **CHANGES)
    found.add_argument(
        "--backbones", default="", metavar="A,B", help="default: those that the recipe evaluates"
    )
    found.add_argument(
        "--knowledge",
        choices=("none", "base"),
        default="none",
        help="base: train with the base LLM's vectors, and search the adapter's experts too",
    )
    found.add_argument(
        "--trials",
        dest="num_trials",
        type=int,
        metavar="N",
        help="per backbone, drawn at random from the grid; 0, the default: the whole grid",
    )
    found.add_argument(
        "--scheduler",
        choices=("asha", "none"),
        help="asha, the default: from half of the epochs on, trials that lag behind end",
    )
    found.add_argument(
        "--concurrent", type=int, metavar="C", help="trials at a time; 0, the default: one per CPU"
    )
    found.add_argument("--seed", type=int, metavar="S", help="of the draw and of every trial")
    found.add_argument("--verbose", action="store_true", help="show Ray's logs, and tracebacks")
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    return parser().parse_intermixed_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Check what costs nothing first, as `dpo4rec run` does; then prepare what is missing, and search."""
    from dpo4rec_ray.config import load_config

    config = load_config(options.recipe, options.changes)
    for flag, value in (("trials", options.num_trials), ("concurrent", options.concurrent)):
        if value is not None and value < 0:
            raise UserError(f"--{flag} {value}: must be 0 or more")
    folder = session.open_run(config, options.verbose)
    from dpo4rec_ray import checks, grid_search
    from dpo4rec_ray.rerankers import RERANKERS
    from dpo4rec_ray.store.artifacts import RunDir

    backbones = tuple(filter(None, options.backbones.split(","))) or config.evaluated_backbones
    for name in backbones:
        if name not in RERANKERS:
            raise UserError(f"--backbones {name}: no such backbone; known: {', '.join(RERANKERS)}")
    given = {name: getattr(options, name) for name in ("num_trials", "scheduler", "concurrent", "seed")}
    plan = grid_search.SearchPlan(
        backbones=tuple(dict.fromkeys(backbones)),
        knowledge=options.knowledge == "base",
        adapter=options.knowledge == "base" and config.reranker.knowledge != "regression",
        **{name: value for name, value in given.items() if value is not None},
    )
    checks.check_all(config, "" if plan.knowledge else "prepare")
    store = RunDir(folder)
    with session.ray_job(folder, options.verbose):
        prepare(config, store, plan.knowledge)
        try:
            grid_search.run(config, store, plan)
        except KeyboardInterrupt:
            print("interrupted; the same command searches from the start", file=sys.stderr)
            return 130
    print(f"found: {store.root / grid_search.FOLDER / grid_search.FRAGMENT}")
    return 0


def prepare(config: Config, store: RunDir, knowledge: bool) -> None:
    """The stages that a search reads from, each unless it is complete."""
    from dpo4rec_ray.pipeline import before_rounds
    from dpo4rec_ray.running import Runner, Selection

    runner = Runner(config, store, Selection())
    for name in before_rounds(config) if knowledge else ["prepare"]:
        if name != "train_reward":
            runner.step(name, 0)
