"""A data source: its files, a parser for each of them, and what a parser returns for one block of a file.

A source reads no events itself. The room `prepare` cuts the files into blocks and parses them on any worker; it knows no
format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
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
# Logged candidate lists. Null means: `split` is to be drawn, `timestamp_s` is unknown, the history comes from the events.
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
# Bad rows that are kept per reason and block, and characters that are kept of each.
MAX_SHOWN = 20
MAX_TEXT = 200


@dataclass(frozen=True)
class BadLine:
    """One row that could not be used; `row` counts the lines (of Parquet: the rows) from 0 within its block."""

    row: int
    reason: str
    text: str


@dataclass
class BadRows:
    """Damaged rows: how many for each reason, and the first of them."""

    counts: Counter[str] = field(default_factory=Counter[str])
    shown: list[BadLine] = field(default_factory=list[BadLine])

    def add(self, row: int, reason: str, text: bytes | str) -> None:
        self.counts[reason] += 1
        if self.counts[reason] <= MAX_SHOWN:
            text = text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else text
            self.shown.append(BadLine(int(row), reason, text[:MAX_TEXT]))


@dataclass(frozen=True)
class Parsed:
    """One block. rows_read = table.num_rows + the quarantined + the filtered, always.

    Attributes:
        table: columns of EVENTS, ITEMS, USERS or LISTS.
        quarantined: rows that are damaged.
        filtered: rows that are sound and not wanted.
        cleaned: rows that were repaired and kept.
        row_of: [table.num_rows] the line or row of the block that each row came from; None: the same.
        num_lines: lines of the block; None: as many as rows.
        spans_lines: rows span lines, and were therefore not read: read `DataFile.over_lines` instead.
    """

    table: pa.Table
    rows_read: int
    quarantined: BadRows = field(default_factory=BadRows)
    filtered: Counter[str] = field(default_factory=Counter[str])
    cleaned: Counter[str] = field(default_factory=Counter[str])
    row_of: NDArray[np.int64] | None = None
    num_lines: int | None = None
    spans_lines: bool = False


@dataclass(frozen=True)
class DataFile:
    """One file and how a block of it is parsed.

    Attributes:
        path: local path or URI; `.gz`, `.bz2` and `.zst` are unpacked while they are read.
        parse: picklable. For "lines" it gets whole lines as bytes, for "parquet" a pyarrow table.
        header: "lines" only: the first line holds names and is not given to `parse`.
        complete: "lines" only: the publisher ends every line, so a file without a last line end is truncated.
        stream_encoding: "lines" only: line ends are found only after the file was decoded, as one stream. "": UTF-8, or an
            encoding with the same line ends.
        join: "lines" only: makes one line of a row that spans lines; the file is one stream then.
        over_lines: the same file with `join`, for the case that its rows span lines. None: they cannot.
        note: what was found out about the file that a person should know.
        columns: "parquet" only: those that `parse` needs; none: all.
        table: kind "memory" only: the parsed rows themselves.
    """

    path: str
    parse: Callable[..., Parsed] | None = None
    kind: Literal["lines", "parquet", "memory"] = "lines"
    header: bool = False
    complete: bool = False
    stream_encoding: str = ""
    join: Callable[[Iterator[bytes]], Iterator[bytes]] | None = None
    over_lines: DataFile | None = None
    note: str = ""
    columns: tuple[str, ...] = ()
    table: pa.Table | None = None


@dataclass(frozen=True)
class Source:
    """A dataset on disk or in memory.

    Attributes:
        closed: an event whose user or item has no line in `users` or `items` is damaged. If not closed, such an event is
            kept, and the item is shown by its id.
        truth: "facet: value" strings that each user loves (columns raw_id, tastes); sample world only.
    """

    events: tuple[DataFile, ...]
    items: tuple[DataFile, ...] = ()
    users: tuple[DataFile, ...] = ()
    lists: tuple[DataFile, ...] = ()
    closed: bool = False
    truth: pa.Table | None = None
