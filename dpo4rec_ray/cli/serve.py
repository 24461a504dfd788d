"""Publish finished runs and serve reranks.

dpo4rec serve run [RUN_FOLDER] [serving.key=value ...]     publish and promote it if that is new, and serve on this machine
dpo4rec serve publish RUN_FOLDER [--as NAME] [--model NAME] [--promote]
dpo4rec serve promote NAME | rollback | split NAME PERCENT | shadow NAME | status
dpo4rec serve config [serving.key=value ...]               a config file for `serve deploy`

All take --registry FOLDER (default: runs/registry). A server follows its registry: within a second (serving.poll_s) it loads
a promoted version beside the versions that answer, checks it against recorded requests, and replaces them. A broken version
is refused. `run` serves until Ctrl-C or SIGTERM. `config` says what every node of a cluster needs.
"""

from __future__ import annotations

import argparse
import sys
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

    def action(name: str, act: str, text: str, *lines: tuple[str, str]) -> argparse.ArgumentParser:
        more: dict[str, Any] = {"epilog": examples(*lines), "formatter_class": Formatter} if lines else {}
        added = actions.add_parser(name, parents=[common], help=text, description=text, **more)
        added.set_defaults(act=act)
        return added

    changes: dict[str, Any] = {
        "nargs": "*",
        "default": [],
        "metavar": "serving.key=value",
        "help": "`dpo4rec config serving` explains the keys",
    }
    version: dict[str, Any] = {"metavar": "NAME", "help": "of a published version (`dpo4rec serve status`)"}
    one = action(
        "run",
        "run",
        "publish and promote a run if that is new, and serve on this machine",
        ("dpo4rec serve run runs/demo", "on port 8000 of this machine"),
        ("dpo4rec serve run runs/demo serving.port=8001", "on another port"),
        ("dpo4rec serve run serving.token_file=tokens.txt", "what is promoted, for those who have a token"),
    )
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
    action("promote", "change", "make a version the current one, which answers").add_argument(
        "name", **version
    )
    action("rollback", "change", "return to the version before; a split and a shadow end")
    one = action("split", "change", "let a second version answer a share of the users; 0 ends it")
    one.add_argument("name", **version)
    one.add_argument("percent", type=float, metavar="PERCENT", help="of the users, from 0 to 100")
    one = action("shadow", "change", "let a second version rank too, and measure how it differs")
    one.add_argument("name", nargs="?", default="", **version | {"help": f"{version['help']}; none: end it"})
    action("status", "status", "list the versions, and which of them answer")
    action("config", "config", "print a config file for `serve deploy`").add_argument("changes", **changes)
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    whole = parser()
    options, rest = whole.parse_known_args(arguments)
    # argparse does not take positional arguments behind an option
    if rest and (not hasattr(options, "changes") or any(one.startswith("-") for one in rest)):
        hint = (
            as_setting(sys.argv[1:] if arguments is None else arguments)
            if hasattr(options, "changes")
            else ""
        )
        whole.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:
        options.changes = [*options.changes, *rest]
    return options


def as_setting(words: list[str]) -> str:
    """A hint for the first option that is the key of a setting, as in `--port 8001`; "": there is none."""
    from dpo4rec_ray.config.serving import ServingSection

    for option, behind in zip(words, [*words[1:], ""], strict=True):
        name, _, value = option.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if option.startswith("--") and key != "registry" and key in ServingSection.model_fields:
            return f"; set serving.{key}={value or behind or '...'}"
    return ""
