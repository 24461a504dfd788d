"""dpo4rec status RUN_FOLDER: what of a run is finished, running, how fast, and what is left."""

from __future__ import annotations

import argparse
import json
import time

from dpo4rec_ray.cli import session
from dpo4rec_ray.cli.arguments import Formatter, examples
from dpo4rec_ray.errors import UserError


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dpo4rec status",
        description="What of a run is finished, running, how fast, and what is left. Needs the run folder alone, not the job's "
        "machine, and disturbs nothing.",
        epilog=examples(
            ("dpo4rec status runs/demo", "a line per stage"),
            ("dpo4rec status runs/demo --events", "what happened, a line of JSON per event"),
            ("watch -n 10 dpo4rec status runs/demo", "follow it"),
        ),
        formatter_class=Formatter,
    )
    found.add_argument("run", metavar="RUN_FOLDER")
    forms = found.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="one object, for programs")
    forms.add_argument(
        "--events", action="store_true", help="the events of all its jobs in place of the status"
    )
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return session.guarded(lambda: show(options), verbose=False)


def show(options: argparse.Namespace) -> int:
    """Print the status, or the events.

    Raises:
        UserError: the folder is no run.
    """
    from dpo4rec_ray.config import read_config
    from dpo4rec_ray.store.artifacts import RunDir
    from dpo4rec_ray.store.events import read_events

    store = RunDir(options.run)
    if options.events:
        found = read_events(store)
        if not found:
            raise UserError(f"{options.run}: holds no events; name the folder of a run (run.root/run.name)")
        print("\n".join(map(json.dumps, found)))
        return 0
    from dpo4rec_ray.run_status import lines, status

    now = status(read_config(options.run), store, time.time())
    print(json.dumps(now.as_dict(), indent=1) if options.json else "\n".join(lines(now)))
    return 0
