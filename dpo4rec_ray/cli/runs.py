"""dpo4rec runs ROOT: the runs below a folder, a line each with their verdict."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dpo4rec_ray.cli import session
from dpo4rec_ray.cli.arguments import Formatter, examples
from dpo4rec_ray.errors import UserError


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dpo4rec runs",
        description="The runs below a folder, a line each with its verdict: what the best round's texts add to NDCG@5 of test "
        "users, what training added to them, and the weak rung. What is not finished says how far it came.",
        epilog=examples(
            ("dpo4rec runs runs", "those of this folder"), ("dpo4rec runs s3://bucket/runs", "on any storage")
        ),
        formatter_class=Formatter,
    )
    found.add_argument("root", metavar="ROOT", nargs="?", default="runs")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return session.guarded(lambda: show(options), verbose=False)


def show(options: argparse.Namespace) -> int:
    """Print a line per run.

    Raises:
        UserError: no such folder, or no run in it.
    """
    from dpo4rec_ray.evaluation.verdict import verdict
    from dpo4rec_ray.storage.places import place

    root = place(options.root)
    if not root.is_dir():
        raise UserError(f"{options.root}: no such folder")
    runs = sorted(
        (one for one in root.iterdir() if (one / "config.json").is_file()), key=lambda one: one.name
    )
    if not runs:
        raise UserError(f"{options.root}: holds no run folder")
    width = max(len(one.name) for one in runs)
    for one in runs:
        file = one / "summary.json"
        done = file.is_file()
        about = verdict(json.loads(file.read_text(encoding="utf-8"))).headline if done else unfinished(one)
        print(f"{one.name:<{width}}  {about}")
    return 0


def unfinished(folder: Any) -> str:
    from dpo4rec_ray.config import read_config
    from dpo4rec_ray.pipeline import made, steps
    from dpo4rec_ray.store.artifacts import RunDir

    store = RunDir(folder)
    for name, number in steps(read_config(folder)):
        if not made(store, name, number):
            return f"not finished: {name}({number}) is next"
    return "not finished: report is next"
