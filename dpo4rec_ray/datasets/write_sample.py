"""Synthetic raw files in a real dataset's layout: python -m dpo4rec_ray.datasets.write_sample --like amazon-books DEST."""

from __future__ import annotations

import argparse
import sys

from dpo4rec_ray.datasets import amazon_like
from dpo4rec_ray.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Write the files; a user's mistake becomes one line and code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m dpo4rec_ray.datasets.write_sample",
        description="Write synthetic raw files of a real dataset's shape.",
    )
    amazon_like.add_arguments(parser)
    try:
        amazon_like.main(parser.parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
