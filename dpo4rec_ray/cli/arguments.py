"""What the parsers of several commands share."""

from __future__ import annotations

import argparse
from typing import Any

# Examples stand in the epilog as they are.
Formatter = argparse.RawDescriptionHelpFormatter
RECIPE: dict[str, Any] = {
    "metavar": "RECIPE",
    "help": "name of a bundled recipe (`dpo4rec recipes list`), or a TOML file",
}
CHANGES: dict[str, Any] = {
    "nargs": "*",
    "default": [],  # else argparse says that one is required
    "metavar": "FRAGMENT.toml | section.key=value",
    "help": "values that replace the recipe's: first those of TOML files, such as a search's found.toml, in order, then "
    "single ones; `dpo4rec config` explains every key",
}


def examples(*lines: tuple[str, str]) -> str:
    """The epilog of a help: command lines, and what they do."""
    width = max(len(command) for command, _ in lines)
    return "\n".join(["examples:", *(f"  {command:<{width}}   {what}" for command, what in lines)])
