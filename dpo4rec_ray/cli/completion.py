"""dpo4rec completion SHELL: what makes a shell complete the commands, options and files of `dpo4rec`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from dpo4rec_ray.cli.arguments import Formatter, examples

SHELLS = ("bash", "zsh", "fish", "tcsh")
# Arguments that are files or folders, by name.
PATHS = {"recipe", "changes", "run", "files", "folder", "out", "registry"}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dpo4rec completion",
        description="Print a shell's completion of commands, options and files.",
        epilog=examples(
            ('eval "$(dpo4rec completion bash)"', "in ~/.bashrc"),
            ("dpo4rec completion zsh > FOLDER/_dpo4rec", "with FOLDER in $fpath, before compinit"),
            ("dpo4rec completion fish > ~/.config/fish/completions/dpo4rec.fish", "for fish"),
        ),
        formatter_class=Formatter,
    )
    found.add_argument("shell", choices=SHELLS)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print it."""
    options = parser().parse_args(arguments)
    import shtab

    from dpo4rec_ray import stages
    from dpo4rec_ray.cli.front import tree
    from dpo4rec_ray.config.bundled_recipes import names

    whole = tree()
    for action in _actions(whole):
        if action.dest == "recipe" and options.shell == "bash":  # other shells get words or files, not both
            action.choices = [*names(), *shtab.Required.FILE]
        elif action.dest in PATHS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        if action.metavar == "STAGE":
            action.choices = stages.NAMES
    print(shtab.complete(whole, options.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of its sub-commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
