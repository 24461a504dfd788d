"""dpo4rec runs ROOT: the runs below a folder, a line each with their verdict."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dpo4rec_ray.cli import session
from dpo4rec_ray.cli.arguments import Formatter, examples
from dpo4rec_ray.errors import UserError, first_line


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
    """Print a line per run; one that cannot be read says so and hides no other.

    Raises:
        UserError: no such folder, or no run in it.
    """
    from dpo4rec_ray.storage.places import place

    root = place(options.root)
    if not root.is_dir():
        raise UserError(f"{options.root}: no such folder")
    runs = sorted((one for one in root.iterdir() if is_run(one)), key=lambda one: one.name)
    if not runs:
        raise UserError(f"{options.root}: holds no run folder")
    width = max(len(one.name) for one in runs)
    for one in runs:
        try:
            about = headline(one)
        except Exception as error:  # half-written, of another version, or not ours to read
            # A KeyError's text is the key alone.
            kind = f"{type(error).__name__}: " if isinstance(error, KeyError) else ""
            about = f"cannot be read: {kind}{first_line(error)}"
        print(f"{one.name:<{width}}  {about}")
    return 0


def is_run(folder: Any) -> bool:
    """Whether a folder is a run's; one that may not be looked into counts, so that its line says why."""
    try:
        return (folder / "config.json").is_file()
    except OSError:
        return True


def headline(folder: Any) -> str:
    """The verdict on a run, or how far it came."""
    from dpo4rec_ray.evaluation.verdict import verdict

    file = folder / "summary.json"
    if not file.is_file():
        return unfinished(folder)
    return verdict(json.loads(file.read_text(encoding="utf-8"))).headline


def unfinished(folder: Any) -> str:
    from dpo4rec_ray.config import read_config
    from dpo4rec_ray.pipeline import made, steps
    from dpo4rec_ray.store.artifacts import RunDir

    store = RunDir(folder)
    for name, number in steps(read_config(folder)):
        if not made(store, name, number):
            return f"not finished: {name}({number}) is next"
    return "not finished: report is next"
