"""Rows of CSV that span lines, because a quoted field holds line breaks (RFC 4180), become one line each.

Everything else reads lines: files are cut, parsed and repaired by them. A line break within a row becomes the byte JOINT, and
the reader of the row puts it back. A row is joined only if it follows the rules strictly and has the header's number of
fields. So a quote that is never closed costs its own line: it cannot swallow those after it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dpo4rec_ray.datasets.source import BadRows, Parsed

# The record separator of ASCII, which no text has a use for.
JOINT = b"\x1e"
Places = NDArray[np.int64]


def csv_reader(lines: Iterable[str], delimiter: str, quote: str, escape: str) -> Iterator[list[str]]:
    """Python's strict reader; quote, escape: "" for none."""
    quoting = csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE
    return csv.reader(
        lines,
        delimiter=delimiter,
        quotechar=quote or None,
        quoting=quoting,
        escapechar=escape or None,
        strict=True,
    )


@dataclass(frozen=True)
class RowJoiner:
    """Joins the rows of a file whose rows have `num_fields` fields. The other fields are as in CsvForm, and quote is not ""."""

    num_fields: int
    delimiter: str
    quote: str
    escape: str

    def __call__(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Pieces of whole lines -> pieces of whole lines, each of them a row."""
        rest = b""
        for piece in pieces:
            text = piece.replace(JOINT, b" ") if JOINT in piece else piece
            joined, rest = self._joined(rest + text.replace(b"\r\n", b"\n"), last=False)
            if joined:
                yield joined
        if rest:
            yield self._joined(rest, last=True)[0]

    def finds_any(self, block: bytes) -> bool:
        """Whether a row of the block spans lines, or may do so beyond its end."""
        joined, rest = self._joined(block, last=False)
        return JOINT in joined or bool(rest)

    def _joined(self, text: bytes, *, last: bool) -> tuple[bytes, bytes]:
        """The text with one line per row, and the last lines, if their row is not complete yet."""
        quote, escape = self.quote.encode(), self.escape.encode()
        if quote not in text:
            return text, b""
        plain = text.replace(escape * 2, b"  ").replace(escape + quote, b"  ") if escape else text
        ends = _places(plain, b"\n") + 1
        if not text.endswith(b"\n"):
            ends = np.append(ends, len(text))
        starts = np.concatenate([[0], ends[:-1]])
        quotes = np.searchsorted(_places(plain, quote), np.append(starts, len(text)))
        joined, done = bytearray(text), 0
        # A row that begins in a line goes on behind it only if the line holds an odd number of quotes.
        for line in np.flatnonzero(np.diff(quotes) % 2).tolist():
            if line < done:
                continue
            size = self._row_size(text, starts, ends, line, last=last)
            if not size:
                return bytes(joined[: starts[line]]), text[starts[line] :]
            for end in ends[line : line + size - 1].tolist():
                joined[end - 1] = JOINT[0]
            done = line + size
        return bytes(joined), b""

    def _row_size(self, text: bytes, starts: Places, ends: Places, line: int, *, last: bool) -> int:
        """Lines of the row that begins at a line; 0: it goes on beyond the last line."""
        fed = 0

        def feed() -> Iterator[str]:
            nonlocal fed
            for place in range(line, len(ends)):
                fed += 1
                yield text[starts[place] : ends[place]].decode("utf-8", "surrogateescape")

        try:
            fields = next(csv_reader(feed(), self.delimiter, self.quote, self.escape))
        except csv.Error:  # a strange quote, or a field of more than csv.field_size_limit() characters
            return 0 if not last and line + fed == len(ends) else 1
        return fed if len(fields) == self.num_fields else 1


def _places(text: bytes, sign: bytes) -> Places:
    return np.flatnonzero(np.frombuffer(text, np.uint8) == sign[0])


def lines_counted(parsed: Parsed, block: bytes) -> Parsed:
    """`parsed` of a block of joined rows, with places in lines in place of rows."""
    joints, ends = _places(block, JOINT), _places(block, b"\n") + 1
    starts = np.concatenate([[0], ends])
    line_of = np.arange(len(starts)) + np.searchsorted(joints, starts)
    bad = parsed.quarantined
    shown = [
        replace(one, row=int(line_of[one.row]), text=one.text.replace(JOINT.decode(), "\n"))
        for one in bad.shown
    ]
    rows = np.arange(parsed.table.num_rows) if parsed.row_of is None else parsed.row_of
    num_lines = len(ends) + (not block.endswith(b"\n")) + len(joints)
    return replace(parsed, quarantined=BadRows(bad.counts, shown), row_of=line_of[rows], num_lines=num_lines)
