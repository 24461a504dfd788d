"""Writes the pages that come from the code, configuration.md and cli.md: python docs/generate.py"""

from __future__ import annotations

import re
from pathlib import Path

from dpo4rec_ray.cli import front
from dpo4rec_ray.config import reference

FOLDER = Path(__file__).resolve().parent
NOTE = "<!-- Written by docs/generate.py. Do not edit. -->"
CONFIGURATION = f"""{NOTE}
# Configuration

A recipe is one TOML file with these sections; every key has a default. `dpo4rec config SECTION.KEY` prints the same in a
terminal, `section.key=value` on the command line replaces a value, and an unknown key is refused with the nearest known one.

"""
SECTION = re.compile(r"docs/method\.md, section (\d+)")
COMMANDS = f"""{NOTE}
# Commands

`dpo4rec COMMAND --help` prints the same in a terminal. The files in `jobs/` of a checkout are the same commands, for
`ray job submit`. The exit code is 0; 2, with one line, for what you can mend; 130 when interrupted (`serve run` ends with 0).
"""


def configuration() -> str:
    """Every key of a recipe, a table per section, with links to the method's sections."""
    method = (FOLDER / "method.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## ((\d+)\. .+)$", method, re.MULTILINE)
    anchors = {number: re.sub(r"\W+", "-", heading.lower()) for heading, number in headings}
    tables = reference.as_markdown(reference.keys())
    return CONFIGURATION + SECTION.sub(lambda found: f"[The method](method.md#{anchors[found[1]]})", tables)


def commands() -> str:
    """The help of every command. argparse words some lines differently from one Python to the next: this is 3.11's."""
    sections = (f"\n## {command}\n```text\n{text.rstrip()}\n```\n" for command, text in front.help_texts())
    return COMMANDS + "".join(sections)


PAGES = {"configuration.md": configuration, "cli.md": commands}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
