"""dpo4rec sample FOLDER: the sample world as files that the recipe own_table reads as they are."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpo4rec_ray.cli import session
from dpo4rec_ray.cli.arguments import Formatter, examples
from dpo4rec_ray.errors import UserError

INTERACTIONS, ITEMS = "interactions.csv", "items.csv"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dpo4rec sample",
        description=f"Write the sample world as files, to see what files look like: {INTERACTIONS} and {ITEMS}.",
        epilog=examples(
            ("dpo4rec sample data/sample", "600 users and 320 items"),
            ("dpo4rec run own_table data.raw_dir=data/sample --only prepare", "the files as a run sees them"),
        ),
        formatter_class=Formatter,
    )
    found.add_argument("folder", metavar="FOLDER", help="where to write; made when it is missing")
    found.add_argument(
        "changes",
        nargs="*",
        default=[],  # else argparse says that one is required
        metavar="section.key=value",
        help="sample.num_users, sample.num_items, sample.catalogue_seed and run.seed; `dpo4rec config sample` explains them",
    )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Write the files, and print how they are used."""
    options = parser().parse_args(arguments)
    return session.guarded(lambda: write_sample(Path(options.folder), options.changes), verbose=False)


def write_sample(folder: Path, changes: list[str]) -> int:
    """Raises UserError if a file is there already, or a change does not fit."""
    import pyarrow as pa
    from pyarrow.csv import write_csv

    from dpo4rec_ray.config import default_config
    from dpo4rec_ray.datasets import synthetic
    from dpo4rec_ray.storage.places import new_file

    for change in changes:
        if not change.startswith(("sample.", "run.seed=")):
            raise UserError(f"{change!r}: only sample.key=value and run.seed=N can be set here")
    config = default_config(changes)
    source = synthetic.describe(config.sample, config.run.seed)
    events, items = source.events[0].table, source.items[0].table
    assert events is not None and items is not None
    facets = [
        dict(one.split(": ", 1) for one in attributes) for attributes in items["attributes"].to_pylist()
    ]
    tables = {
        INTERACTIONS: events.rename_columns(["user_id", "item_id", "rating", "timestamp"]),
        ITEMS: pa.table(
            {
                "item_id": items["raw_id"],
                "title": items["title"],
                **{f"{name}s": [one[name] for one in facets] for name in facets[0]},
            }
        ),
    }
    for name in tables:
        if (folder / name).exists():
            raise UserError(f"{folder / name}: is there already; name another folder")
    for name, table in tables.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with new_file(folder / name) as temporary:
                write_csv(table, temporary)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written to ({error.strerror}); name another folder"
            ) from None
        print(f"{folder / name}: {table.num_rows} rows, {', '.join(table.column_names)}")
    print(f"use it: dpo4rec run own_table data.raw_dir={folder}")
    return 0
