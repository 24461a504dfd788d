"""What a data source says about its files, and what a parser makes of one block of them.

A source names files and hands over one parser per file; it reads no events itself. `stages/prepare.py` cuts the files
into blocks, parses them wherever there is room, and never sees a format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

EVENTS = pa.schema(
    [("user", pa.string()), ("item", pa.string()), ("rating", pa.float32()), ("timestamp_s", pa.int64())]
)
ITEMS = pa.schema([("raw_id", pa.string()), ("title", pa.string()), ("attributes", pa.list_(pa.string()))])
USERS = pa.schema([("raw_id", pa.string()), ("profile", pa.string())])
# Logged candidate lists; null: `split` is drawn, `timestamp_s` is unknown, the history is taken from the events.
LISTS = pa.schema(
    [
        ("user", pa.string()),
        ("timestamp_s", pa.int64()),
        ("split", pa.string()),
        ("candidates", pa.list_(pa.string())),
        ("labels", pa.list_(pa.float32())),
        ("history", pa.list_(pa.string())),
        ("history_ratings", pa.list_(pa.float32())),
    ]
)
MAX_SHOWN = 20  # bad lines kept per reason and block
MAX_TEXT = 200  # characters kept of a bad line


@dataclass(frozen=True)
class BadLine:
    """One row that could not be used."""

    row: int  # within its block, from 0
    reason: str
    text: str


@dataclass
class BadRows:
    """Rows left out, by reason, with the first few of each."""

    counts: Counter[str] = field(default_factory=Counter[str])
    shown: list[BadLine] = field(default_factory=list[BadLine])

    def add(self, row: int, reason: str, text: bytes | str) -> None:
        self.counts[reason] += 1
        if self.counts[reason] <= MAX_SHOWN:
            text = text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else text
            self.shown.append(BadLine(int(row), reason, text[:MAX_TEXT]))


@dataclass(frozen=True)
class Parsed:
    """One block. rows_read = table.num_rows + the quarantined + the filtered, always."""

    table: pa.Table  # EVENTS, ITEMS, USERS or LISTS
    rows_read: int
    quarantined: BadRows = field(default_factory=BadRows)  # rows that are damaged
    filtered: Counter[str] = field(default_factory=Counter[str])  # rows that are sound and not wanted
    cleaned: Counter[str] = field(default_factory=Counter[str])  # rows that were mended and kept
    row_of: NDArray[np.int64] | None = (
        None  # [table.num_rows] which row of the block each came from; None: the same
    )


@dataclass(frozen=True)
class DataFile:
    """One file and how a block of it is parsed.

    Attributes:
        path: local path or URI; `.gz`, `.bz2` and `.zst` are unpacked while they are read.
        parse: picklable. For "lines" it gets whole lines as bytes, for "parquet" a pyarrow table.
        header: "lines" only: the first line holds names and is not given to `parse`.
        complete: "lines" only: the publisher ends every line, so a file that ends within one was cut off.
        columns: "parquet" only: those that `parse` wants; none: all.
        table: kind "memory" only: the parsed rows themselves.
    """

    path: str
    parse: Callable[..., Parsed] | None = None
    kind: Literal["lines", "parquet", "memory"] = "lines"
    header: bool = False
    complete: bool = False
    columns: tuple[str, ...] = ()
    table: pa.Table | None = None


@dataclass(frozen=True)
class Source:
    """A dataset on disk or in memory.

    Attributes:
        closed: an event whose user or item has no line in `users` or `items` is damaged. Otherwise such an item is
            kept and goes by its id.
        truth: "facet: value" strings that each user loves (columns raw_id, tastes); sample world only.
    """

    events: tuple[DataFile, ...]
    items: tuple[DataFile, ...] = ()
    users: tuple[DataFile, ...] = ()
    lists: tuple[DataFile, ...] = ()
    closed: bool = False
    truth: pa.Table | None = None
