"""Publish finished runs and serve reranks.

dpo4rec serve run [RUN_FOLDER] [serving.key=value ...]     publish and promote it if that is new, and serve on this machine
dpo4rec serve publish RUN_FOLDER [--as NAME] [--model NAME] [--promote]
dpo4rec serve promote NAME | rollback | split NAME PERCENT | shadow NAME | status
dpo4rec serve config [serving.key=value ...]               a config file for `serve deploy`

All take --registry FOLDER (default: runs/registry). A server follows its registry: within a second (serving.poll_s) it loads
a promoted version beside the versions that answer, checks it against recorded requests, and replaces them. A broken version
is refused. `run` serves until Ctrl-C or SIGTERM. On a cluster, start Ray with RAY_SERVE_ENABLE_HA_PROXY=1 on every node.
"""

from __future__ import annotations

import argparse
from typing import Any

from dpo4rec_ray.cli import session
from dpo4rec_ray.cli.arguments import Formatter, examples


def main(arguments: list[str] | None = None) -> int:
    """Parse and act. A mistake of the user becomes one line and exit code 2."""
    options = parse(arguments)
    return session.guarded(lambda: act(options), options.verbose)


def act(options: argparse.Namespace) -> int:
    from dpo4rec_ray.cli import serve_actions

    return getattr(serve_actions, options.act)(options)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dpo4rec serve",
        description="Publish finished runs and serve reranks over HTTP.",
        epilog=examples(
            ("dpo4rec serve run runs/demo", "publish a run and answer on this machine"),
            ("dpo4rec serve publish runs/demo --as v2", "make a version of a run"),
            ("dpo4rec serve split v2 10", "let it answer a tenth of the users"),
            ("dpo4rec serve status", "which versions there are, and which answer"),
        ),
        formatter_class=Formatter,
    )
    actions = found.add_subparsers(dest="action", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--registry", default="", metavar="FOLDER", help="default: serving.registry, runs/registry"
    )
    common.add_argument("--verbose", action="store_true", help="show Ray's logs, and tracebacks")

    def action(name: str, act: str, text: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, parents=[common], help=text, description=text)
        added.set_defaults(act=act)
        return added

    changes: dict[str, Any] = {
        "nargs": "*",
        "default": [],
        "metavar": "serving.key=value",
        "help": "`dpo4rec config serving` explains the keys",
    }
    one = action("run", "run", "publish and promote a run if that is new, and serve on this machine")
    one.add_argument("run", nargs="?", default="", help="folder of a finished run; none: serve as promoted")
    one.add_argument("changes", **changes)
    one = action("publish", "publish", "make a version of a finished run")
    one.add_argument("run", help="folder of a finished run")
    one.add_argument(
        "--as", dest="name", default="", metavar="NAME", help="name of the version; default: run and time"
    )
    one.add_argument(
        "--model", default="", help="a folder of RUN/eval/rerankers; default: best on validation"
    )
    one.add_argument("--promote", action="store_true", help="and make it the current version")
    action("promote", "change", "make a version the current one, which answers").add_argument("name")
    action("rollback", "change", "return to the version before; a split and a shadow end")
    one = action("split", "change", "let a second version answer a share of the users; 0 ends it")
    one.add_argument("name")
    one.add_argument("percent", type=float)
    one = action("shadow", "change", "let a second version rank too, and measure how it differs")
    one.add_argument("name", nargs="?", default="", help="none: end it")
    action("status", "status", "list the versions, and which of them answer")
    action("config", "config", "print a config file for `serve deploy`").add_argument("changes", **changes)
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    whole = parser()
    options, rest = whole.parse_known_args(arguments)
    # argparse does not take positional arguments behind an option
    if rest and (not hasattr(options, "changes") or any(one.startswith("-") for one in rest)):
        whole.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.changes = [*options.changes, *rest]
    return options
