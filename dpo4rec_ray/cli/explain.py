"""dpo4rec config [SECTION | SECTION.KEY]: every key of a recipe with its default, unit and meaning."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo4rec_ray.cli import session
from dpo4rec_ray.cli.arguments import Formatter, examples

if TYPE_CHECKING:
    from dpo4rec_ray.config.reference import Key


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dpo4rec config",
        description="Explain the keys of a recipe: default, unit and meaning.",
        epilog=examples(
            ("dpo4rec config", "all keys"),
            ("dpo4rec config data", "those of one section"),
            ("dpo4rec config data.user_core", "one key"),
            ("dpo4rec config serving --json", "for programs"),
        ),
        formatter_class=Formatter,
    )
    found.add_argument("wanted", nargs="?", default="", metavar="SECTION | SECTION.KEY", help="default: all")
    forms = found.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="a list of objects")
    forms.add_argument("--markdown", action="store_true", help="a table per section")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the keys."""
    options = parser().parse_args(arguments)
    return session.guarded(lambda: explain(options), verbose=False)


def explain(options: argparse.Namespace) -> int:
    from dpo4rec_ray.config import reference

    found = reference.keys(options.wanted)
    if options.json:
        print(reference.as_json(found))
    elif options.markdown:
        print(reference.as_markdown(found), end="")
    else:
        print(_readable(found))
    return 0


def _readable(found: Sequence[Key]) -> str:
    """As a recipe would say it, and below each key what it holds and means."""
    from dpo4rec_ray.config import reference

    width = min(shutil.get_terminal_size().columns, 110)
    lines: list[str] = []
    section = ""
    for key in found:
        if key.section != section:
            section = key.section
            lines += ["", f"[{section}]", *_wrapped(reference.about(section), "# ", width)]
        kept = " A change of it keeps complete stages." if key.placement else ""
        text = f"({reference.described(key)}) {key.meaning}{kept}"
        lines += ["", f"{key.name} = {key.default}", *_wrapped(text, "    ", width)]
    return "\n".join(lines[1:])


def _wrapped(text: str, indent: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
