"""dpo4rec version: of this package, and of the libraries that shape its figures."""

from __future__ import annotations

import argparse

from dpo4rec_ray.cli.arguments import Formatter, examples


def parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog="dpo4rec version",
        description="Print the versions of this package, of Python, and of the libraries that shape its figures.",
        epilog=examples(
            ("dpo4rec version", "a line each, for a bug report"),
            ("dpo4rec --version", "of this package alone"),
        ),
        formatter_class=Formatter,
    )


def main(arguments: list[str] | None = None) -> int:
    """Print them."""
    parser().parse_args(arguments)
    from dpo4rec_ray.store.versions import versions

    for name, version in versions().items():
        print(f"{name:<14}{version}")
    return 0
