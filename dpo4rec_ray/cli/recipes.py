"""dpo4rec recipes list | show NAME: the recipes that come with the package."""

from __future__ import annotations

import argparse

from dpo4rec_ray.cli import session
from dpo4rec_ray.cli.arguments import Formatter, examples
from dpo4rec_ray.errors import UserError, nearest


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dpo4rec recipes",
        description="The recipes that come with the package. Other commands take them by name.",
        epilog=examples(
            ("dpo4rec recipes list", "names, and what they are for"),
            ("dpo4rec recipes show ml1m", "the TOML file"),
            ("dpo4rec recipes show own_table > my.toml", "a recipe of your own to begin with"),
        ),
        formatter_class=Formatter,
    )
    actions = found.add_subparsers(dest="action", help="default: list")
    text = "list the names, and what each recipe is for"
    actions.add_parser("list", help=text, description=text)
    text = "print a recipe"
    actions.add_parser("show", help=text, description=text).add_argument("name", metavar="NAME")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print the list, or one recipe."""
    options = parser().parse_args(arguments)
    return session.guarded(lambda: show(options), verbose=False)


def show(options: argparse.Namespace) -> int:
    from dpo4rec_ray.config import bundled_recipes as bundled

    if options.action == "show":
        if options.name not in bundled.names():
            raise UserError(f"no bundled recipe {options.name!r}{nearest(options.name, bundled.names())}")
        print(bundled.recipe_file(options.name).read_text(encoding="utf-8"), end="")
        return 0
    width = max(map(len, bundled.names()))
    for name in bundled.names():
        print(f"{name:<{width}}  {bundled.purpose(name)}")
    return 0
