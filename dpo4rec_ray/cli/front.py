"""The command `dpo4rec`: finds the sub-command and hands the arguments on. Imports a sub-command only when it is called."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dpo4rec_ray import __version__
from dpo4rec_ray.cli.arguments import Formatter, examples
from dpo4rec_ray.errors import nearest


@dataclass(frozen=True)
class Command:
    """A sub-command: one line about it, and the module with its `parser()` and `main(arguments)`.

    Such a module imports nothing heavy before it runs: its help and the completion of a shell need the parser alone.
    """

    help: str
    module: str


COMMANDS = {
    "run": Command("run a recipe: all stages, or those that are not complete", "dpo4rec_ray.cli.run"),
    "serve": Command("publish finished runs and serve reranks over HTTP", "dpo4rec_ray.cli.serve"),
    "plan": Command("reckon what a run takes: tokens, time, GPU hours, storage", "dpo4rec_ray.cli.plan"),
    "status": Command(
        "what of a run is finished, running, how fast, and what is left", "dpo4rec_ray.cli.status"
    ),
    "runs": Command("list the runs below a folder with their headlines", "dpo4rec_ray.cli.runs"),
    "compare": Command("set finished runs side by side", "dpo4rec_ray.cli.compare"),
    "study": Command("run a recipe's variants and say what they show", "dpo4rec_ray.cli.study"),
    "search": Command("search training settings of the rerankers", "dpo4rec_ray.cli.search"),
    "prompts": Command("show what the LLM is asked about a user", "dpo4rec_ray.cli.show_prompt"),
    "pairs": Command("export and import preference pairs", "dpo4rec_ray.cli.pairs"),
    "export-model": Command(
        "write a run's policy or reranker as a folder for the Hugging Face Hub",
        "dpo4rec_ray.cli.export_model",
    ),
    "download": Command("download a public dataset", "dpo4rec_ray.cli.download_dataset"),
    "sample": Command(
        "write the sample world as files, to see what files look like", "dpo4rec_ray.cli.sample"
    ),
    "train-llm": Command("train a small LLM over a recipe's catalogue", "dpo4rec_ray.cli.train_llm"),
    "recipes": Command("list and show the bundled recipes", "dpo4rec_ray.cli.recipes"),
    "config": Command("explain the keys of a recipe", "dpo4rec_ray.cli.explain"),
    "version": Command(
        "print the versions of this package and of what it stands on", "dpo4rec_ray.cli.version"
    ),
    "completion": Command("print a shell's completion of this command", "dpo4rec_ray.cli.completion"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the sub-command that the first argument names. Returns the exit code: 2 for what the user can mend."""
    try:
        code = _called(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        return 128 + signal.SIGPIPE
    return code


def _reader_left() -> bool:
    """Whether nobody reads standard output any more: `dpo4rec config | head`."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # of a pipe without a reader, the error is always reported
    return bool(output.poll(0))


def _called(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in COMMANDS:
        return module(name).main(arguments[1:])
    if not name.startswith("-"):
        print(f"error: dpo4rec has no command {name!r}{nearest(name, list(COMMANDS))}", file=sys.stderr)
        return 2
    top().parse_args([name])  # --help, --version, or an unknown option: argparse ends the process
    return 0


def module(name: str) -> Any:
    """The module of a sub-command."""
    return importlib.import_module(COMMANDS[name].module)


def top() -> argparse.ArgumentParser:
    """The parser of `dpo4rec` itself, which knows of its sub-commands only what they are called and for."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    found = argparse.ArgumentParser(
        prog="dpo4rec",
        usage="dpo4rec COMMAND ...",
        description="DPO4Rec as one Ray job: an LLM, taught by the recommender, writes the knowledge that a reranker uses.",
        epilog=f"commands:\n{listed}\n\n`dpo4rec COMMAND --help` says more.\n\n"
        + examples(
            ("dpo4rec run demo", "the whole method on the sample world"),
            ("dpo4rec serve run runs/demo", "reranks of that run over HTTP"),
            ("dpo4rec config data.user_core", "what a key of a recipe means"),
        ),
        formatter_class=Formatter,
    )
    found.add_argument("--version", action="version", version=f"dpo4rec {__version__}")
    return found


def tree() -> argparse.ArgumentParser:
    """`dpo4rec` with all sub-commands in one parser, for a shell's completion."""
    whole = top()
    commands = whole.add_subparsers(dest="command")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, parents=[module(name).parser()], add_help=False)
    return whole


def help_texts() -> Iterator[tuple[str, str]]:
    """Every command ("dpo4rec serve run") and its help, 100 characters wide, in the order of a reference."""
    yield _help(top())
    for name in COMMANDS:
        parser = module(name).parser()
        yield _help(parser)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from map(_help, action.choices.values())


def _help(parser: argparse.ArgumentParser) -> tuple[str, str]:
    parser.formatter_class = functools.partial(Formatter, width=100)
    return parser.prog, parser.format_help()
