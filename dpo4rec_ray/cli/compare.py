"""dpo4rec compare RUN RUN ...: finished runs side by side, with paired differences on the same test lists."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpo4rec_ray.cli import session
from dpo4rec_ray.cli.arguments import Formatter, examples
from dpo4rec_ray.errors import UserError

FORMS = (".html", ".md")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dpo4rec compare",
        description="What the recipes of finished runs differ in, and their figures with paired intervals against the first "
        "run. Runs that were measured on other test lists are refused.",
        epilog=examples(
            ("dpo4rec compare runs/demo runs/demo-grpo", "tables for the terminal"),
            ("dpo4rec compare runs/a runs/b runs/c --out abc.html", "a page; .md for Markdown"),
        ),
        formatter_class=Formatter,
    )
    found.add_argument("runs", metavar="RUN_FOLDER", nargs="+")
    found.add_argument(
        "--out", default="", metavar="FILE", help="write a page (.html) or Markdown (.md) instead"
    )
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return session.guarded(lambda: compare(options), verbose=False)


def compare(options: argparse.Namespace) -> int:
    """Print the comparison, or write it.

    Raises:
        UserError: fewer than two runs, one that is not finished, other test lists, or a file that cannot be written.
    """
    if len(options.runs) < 2:
        raise UserError("name two runs at least")
    target = Path(options.out)
    if options.out and target.suffix not in FORMS:
        raise UserError(f"--out {options.out}: end the name in .html or .md")
    if options.out and not target.parent.is_dir():
        raise UserError(f"--out {options.out}: there is no folder {target.parent}")
    from dpo4rec_ray.evaluation.run_comparison import ComparedRun, check_same_lists
    from dpo4rec_ray.report.comparison import to_html, to_markdown

    runs = [ComparedRun.open(folder) for folder in options.runs]
    check_same_lists(runs)
    if not options.out:
        print(to_markdown(runs), end="")
        return 0
    write = to_html if target.suffix == ".html" else to_markdown
    target.write_text(write(runs), encoding="utf-8")
    print(f"comparison: {target}")
    return 0
