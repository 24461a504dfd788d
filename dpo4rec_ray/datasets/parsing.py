"""A block of lines becomes a table: by the fast reader, and line by line only where that fails.

Every line becomes a row of the table or one of the bad rows, with its reason. No Python object is made per row, except
near a damaged one.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo4rec_ray.datasets.source import EVENTS, ITEMS, MAX_SHOWN, BadRows, Parsed

Fast = Callable[[bytes], pa.Table]
Why = Callable[[bytes], str]

# Lines that are read one by one when the fast reader fails on all of them together.
LEAF = 64
# 2100-01-01: a later time is in milliseconds, or damaged.
MAX_TIMESTAMP_S = 4_102_444_800
EMPTY_LINE, UNREADABLE = "empty line", "unreadable"
WRONG_ENCODING, OPEN_QUOTE = "not in the file's encoding", "a quote is not closed"
FIELD_COUNT, BAD_NUMBER, BAD_JSON = "wrong field count", "bad number", "not JSON"
OUT_OF_RANGE, BAD_TIME = "rating out of range", "impossible timestamp"
UNKNOWN_USER, UNKNOWN_ITEM = "unknown user", "unknown item"
UNRATED = "not rated"
# What a bad line makes a fast reader raise.
REFUSED = (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError)


def missing_field(name: str) -> str:
    """Reason why a row without a field cannot be used."""
    return f"missing field {name.removesuffix('_s')}"


class Lines:
    """A block of lines; the places of the line ends are found when first asked for."""

    def __init__(self, block: bytes):
        # Searching for one byte is much faster than for two.
        self.block = block.replace(b"\r\n", b"\n") if b"\r" in block else block
        if self.block and not self.block.endswith(b"\n"):
            self.block += b"\n"
        self._ends: NDArray[np.int64] | None = None
        self._length = self.block.count(b"\n")

    @property
    def ends(self) -> NDArray[np.int64]:
        """[lines + 1] 0, then the byte after each line."""
        if self._ends is None:
            found = np.flatnonzero(np.frombuffer(self.block, dtype=np.uint8) == 10) + 1
            self._ends = np.concatenate([[0], found])
        return self._ends

    def __len__(self) -> int:
        return self._length

    def line(self, row: int) -> bytes:
        return self.block[self.ends[row] : self.ends[row + 1] - 1]

    def span(self, low: int, high: int) -> bytes:
        """Lines low..high-1 with their line ends."""
        return self.block[self.ends[low] : self.ends[high]]


def parse_lines(lines: Lines, fast: Fast, why: Why, bad_rows: BadRows) -> tuple[pa.Table, NDArray[np.int64]]:
    """Read the lines with `fast`. Where it fails, each half is tried alone, so that only damaged lines are left out.

    Args:
        fast: whole lines -> a table with one row per line; raises one of REFUSED when a line cannot be read.
            A null means that a field is missing.
        why: the reason why one line cannot be used, "" when it finds none.

    Returns:
        The table, and [rows] which line each of its rows came from.
    """
    tables: list[pa.Table] = []
    rows: list[NDArray[np.int64]] = []

    def take(table: pa.Table, where: NDArray[np.int64]) -> None:
        tables.append(table)
        rows.append(where)

    todo = [(0, len(lines))]
    while todo:
        low, high = todo.pop()
        if low == high:
            continue
        whole = lines.block if (low, high) == (0, len(lines)) else lines.span(low, high)
        table = _try(fast, whole, high - low)
        if table is not None:
            take(table, np.arange(low, high))
        elif high - low > LEAF:
            middle = (low + high) // 2
            todo += [(middle, high), (low, middle)]
        else:
            _leaf(lines, low, high, fast, why, bad_rows, take)
    if not tables:
        return pa.table({}), np.zeros(0, dtype=np.int64)
    return pa.concat_tables(tables, promote_options="default"), np.concatenate(rows)


def _try(fast: Fast, block: bytes, num_lines: int) -> pa.Table | None:
    try:
        table = fast(block)
        table.validate(full=True)  # UTF-8 too, which not every reader checks
    except REFUSED:
        return None
    return table if table.num_rows == num_lines else None


def _leaf(
    lines: Lines, low: int, high: int, fast: Fast, why: Why, bad_rows: BadRows, take: Callable[..., None]
) -> None:
    sound: list[int] = []
    for row in range(low, high):
        line = lines.line(row)
        reason = why(line) if line.strip() else EMPTY_LINE
        if reason:
            bad_rows.add(row, reason, line)
        else:
            sound.append(row)
    together = b"".join(lines.span(row, row + 1) for row in sound)
    table = _try(fast, together, len(sound)) if sound else None
    if table is not None:
        take(table, np.array(sound))
        return
    for row in sound:
        table = _try(fast, lines.span(row, row + 1), 1)
        if table is None:
            bad_rows.add(row, UNREADABLE, lines.line(row))
        else:
            take(table, np.array([row]))


class Origin(NamedTuple):
    """Where the rows of a table come from, and the bad rows of the same block.

    Attributes:
        rows: [table.num_rows] rows of the block.
        text_of: row of the block -> its text.
    """

    rows: NDArray[np.int64]
    rows_read: int
    bad_rows: BadRows
    text_of: Callable[[int], bytes | str]

    def quarantine(self, places: NDArray[np.int64], reason: str) -> None:
        """Count the rows at these places of the table as bad."""
        for row in self.rows[places[:MAX_SHOWN]].tolist():
            self.bad_rows.add(row, reason, self.text_of(row))
        if len(places) > MAX_SHOWN:
            self.bad_rows.counts[reason] += len(places) - MAX_SHOWN


def parsed_lines(block: bytes, fast: Fast, why: Why) -> tuple[pa.Table, Origin]:
    """`parse_lines` of a block, with the origin of its rows."""
    lines, bad_rows = Lines(block), BadRows()
    table, rows = parse_lines(lines, fast, why, bad_rows)
    return table, Origin(rows, len(lines), bad_rows, lines.line)


def parse_events(
    block: bytes, fast: Fast, why: Why, *, ratings: tuple[float, float], unrated: float | None = None
) -> Parsed:
    """One block of events. `fast` gives the columns of EVENTS (rating may be float64); the rest as `checked_events`."""
    return checked_events(*parsed_lines(block, fast, why), ratings=ratings, unrated=unrated)


def checked_events(
    table: pa.Table, origin: Origin, *, ratings: tuple[float, float], unrated: float | None = None
) -> Parsed:
    """Leave out events with missing fields, impossible ratings or times, and events without a rating.

    Args:
        ratings: the lowest and the highest rating that are possible.
        unrated: a rating with this value means that the user gave none; such rows are filtered.
    """
    if not table.num_rows:
        return Parsed(EVENTS.empty_table(), origin.rows_read, origin.bad_rows)
    filtered: Counter[str] = Counter()
    ids, numbers = ("user", "item"), ("rating", "timestamp_s")
    missing = {name: pc.fill_null(pc.binary_length(table[name]), 0).to_numpy() == 0 for name in ids}
    missing |= {name: table[name].is_null().to_numpy() for name in numbers}
    complete = ~np.logical_or.reduce(list(missing.values()))
    rating = pc.fill_null(table["rating"].cast(pa.float64()), float("nan")).to_numpy()
    timestamp = pc.fill_null(table["timestamp_s"].cast(pa.int64()), 0).to_numpy()
    none_given = (rating == unrated) & complete if unrated is not None else np.zeros(len(rating), np.bool_)
    in_range = (rating >= ratings[0]) & (rating <= ratings[1])  # nan is not in range
    good = ~none_given
    for reason, bad in (
        *((missing_field(name), absent) for name, absent in missing.items()),
        (OUT_OF_RANGE, ~in_range),
        (BAD_TIME, (timestamp < 0) | (timestamp >= MAX_TIMESTAMP_S)),
    ):
        origin.quarantine(np.flatnonzero(bad & good), reason)
        good &= ~bad
    if none_given.any():
        filtered[UNRATED] = int(none_given.sum())
    rows = origin.rows
    if not good.all():
        table, rows = table.filter(pa.array(good)), rows[good]
    table = table.select(EVENTS.names).cast(EVENTS)
    return Parsed(table, origin.rows_read, origin.bad_rows, filtered, row_of=rows)


def parse_items(block: bytes, fast: Fast, why: Why) -> Parsed:
    """One block of items. `fast` gives the columns of ITEMS; a null or empty title is kept."""
    return checked_items(*parsed_lines(block, fast, why))


def checked_items(table: pa.Table, origin: Origin) -> Parsed:
    """Leave out items without an id; clean the titles and attributes of the others."""
    if not table.num_rows:
        return Parsed(ITEMS.empty_table(), origin.rows_read, origin.bad_rows)
    missing = pc.fill_null(pc.binary_length(table["raw_id"]), 0).to_numpy() == 0
    origin.quarantine(np.flatnonzero(missing), missing_field("item"))
    rows = origin.rows
    if missing.any():
        table, rows = table.filter(pa.array(~missing)), rows[~missing]
    titles, num_titles = clean_strings(table["title"].combine_chunks())
    lists = table["attributes"].combine_chunks()
    values, _ = clean_strings(lists.values)
    attributes = pa.ListArray.from_arrays(lists.offsets, values) if len(lists) else lists
    cleaned = Counter({"titles": num_titles}) if num_titles else Counter[str]()
    columns = {"raw_id": table["raw_id"], "title": titles, "attributes": attributes}
    table = pa.table(columns).cast(ITEMS)
    return Parsed(table, origin.rows_read, origin.bad_rows, cleaned=cleaned, row_of=rows)


# Entities, tags and control characters. The last alternative is a script, which Amazon's 2018 files have in some titles.
_DIRTY = r"&#?\w+;|</?\w[^>]*>|[\x00-\x1f\x7f]|\(new Date\(\)\)\.getTime"
_SCRIPT = re.compile(r"\(new Date\(\)\)\.getTime")
_TAG = re.compile(r"</?\w[^>]*>")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def clean_strings(texts: pa.StringArray) -> tuple[pa.StringArray, int]:
    """Trimmed texts without HTML entities, tags and control characters, and how many had any. Nulls stay."""
    texts = pc.utf8_trim_whitespace(texts)
    dirty = pc.fill_null(pc.match_substring_regex(texts, _DIRTY), False).to_numpy(zero_copy_only=False)
    places = np.flatnonzero(dirty)
    if not len(places):
        return texts, 0
    mended = [clean_string(texts[int(place)].as_py()) for place in places]
    return pc.replace_with_mask(texts, pa.array(dirty), pa.array(mended, texts.type)), len(places)


def clean_string(text: str) -> str:
    """One string without markup; "" when it is a script."""
    if _SCRIPT.search(text):
        return ""
    text = _TAG.sub(" ", html.unescape(html.unescape(text)))
    return " ".join(_CONTROL.sub(" ", text).split())


def is_number(text: bytes, *, whole: bool) -> bool:
    """Whether a field is a plain decimal number that the fast readers accept too."""
    return (_WHOLE if whole else _DECIMAL).fullmatch(text.strip()) is not None


# What pyarrow accepts, so that both ways of reading accept the same lines. nan and inf are outside every range.
_WHOLE = re.compile(rb"-?[0-9]{1,18}|0[xX][0-9a-fA-F]{1,15}")
_DECIMAL = re.compile(
    rb"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|-?(nan|inf|infinity)", re.IGNORECASE
)


def why_fields(
    line: bytes, separator: bytes, num_fields: int, numbers: Sequence[tuple[int, bool]] = ()
) -> str:
    """Reason why a separated line cannot be used. numbers: (place, whole) of the fields that must be numbers."""
    fields = line.split(separator)
    if len(fields) != num_fields:
        return FIELD_COUNT
    if any(not is_number(fields[place], whole=whole) for place, whole in numbers):
        return BAD_NUMBER
    return ""
