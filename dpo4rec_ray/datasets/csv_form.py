"""How a CSV file is written: what the recipe says, and what its first bytes show where the recipe says nothing."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from dpo4rec_ray.config.data import TextFilesSection
from dpo4rec_ray.datasets import files
from dpo4rec_ray.datasets.csv_rows import JOINT, RowJoiner, csv_reader
from dpo4rec_ray.errors import UserError

DELIMITERS = (",", ";", "\t", "|")
# The longest first: the mark of UTF-16 begins the mark of UTF-32.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Bytes that could not be decoded.
_STRANGE = re.compile("[\udc80-\udcff]")
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


@dataclass(frozen=True)
class CsvForm:
    """How a file is written.

    Attributes:
        columns: their names, in order.
        has_header: the first line holds the names.
        padded: names have blanks around them, as fields then have too.
        delimiter, quote, escape: one character each; "" for no quotes and no escapes.
        encoding: of each line; "utf-8" also where `stream_encoding` is set, as lines are decoded by then.
        stream_encoding: as in DataFile.
        note: what was found out and the recipe does not say; "" for nothing.
        spans_lines: a row was seen that spans lines.
    """

    columns: tuple[str, ...]
    has_header: bool
    padded: bool
    delimiter: str
    quote: str
    escape: str
    encoding: str
    stream_encoding: str
    note: str
    spans_lines: bool = False

    def reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        """Python's reader of lines in this form."""
        return csv_reader(lines, self.delimiter, self.quote, self.escape)

    @property
    def joiner(self) -> RowJoiner | None:
        """Joins rows that span lines; None where a field cannot be quoted."""
        if not self.quote:
            return None
        return RowJoiner(len(self.columns), self.delimiter, self.quote, self.escape)


def find_form(
    path: str,
    usual: str,
    section: TextFilesSection,
    section_name: str,
    columns: tuple[str, ...],
    suits: Callable[[tuple[str, ...]], bool],
) -> CsvForm:
    """The form of the file. Reads its first bytes alone.

    Args:
        usual: the delimiter that the file's name lets expect.
        section_name: of the recipe, for messages.
        columns: names of the columns of a file without a header; none: the first line holds them.
        suits: whether names of columns are those that are needed.

    Raises:
        UserError: the first line is no header, its fields are not as many as `columns`, or the text is not UTF-8.
    """
    head = files.read_head(path)
    encoding = section.encoding or _found_encoding(head)
    text = _decoded(head, encoding)
    # Splitting bytes at line ends needs an encoding with those of ASCII, and files of old Macs have none.
    streamed = "\n".encode(encoding) != b"\n" or ("\n" not in text and "\r" in text)
    lines = (text.replace("\r\n", "\n").replace("\r", "\n") if streamed else text).split("\n")
    lines = [line.removesuffix("\r") for line in lines]
    if len(head) >= files.HEAD_BYTES:
        lines = lines[: max(1, len(lines) - 1)]  # the last one is cut off
    _check_encoding(path, section_name, encoding, lines)

    delimiter, header = _split_header(lines[0], usual, section, columns, suits)
    names = columns or header
    if len(header) != len(names) or (lines[0].strip() and not names):
        wanted = (
            f"the {len(columns)} columns that the recipe names" if columns else "a header of column names"
        )
        raise UserError(
            f"{path}: the first line is not {wanted}: {lines[0][:100]!r}; see {section_name}.delimiter and "
            f"{section_name}.quote"
        )
    rows = [_fields(line, delimiter, section) for line in lines[1:] if line.strip()]
    if not columns and rows and all(len(row) == len(names) + 1 and not row[-1] for row in rows):
        names = (*names, "")  # rows end with a delimiter, and the header does not
    notes = [
        f"fields are separated by {_NAMES[delimiter]}" if delimiter not in (section.delimiter, usual) else "",
        f"the encoding is {encoding}" if encoding not in (section.encoding, "utf-8") else "",
        "lines end with carriage returns" if streamed and encoding == "utf-8" else "",
    ]
    form = CsvForm(
        columns=tuple(name.strip() for name in names),
        has_header=not columns,
        padded=any(name != name.strip() for name in names),
        delimiter=delimiter,
        quote=section.quote,
        escape=section.escape,
        encoding="utf-8" if streamed else encoding,
        stream_encoding=encoding if streamed else "",
        note=" and ".join(filter(None, notes)),
    )
    sample = "\n".join(lines).encode("utf-8", "surrogateescape")
    spans = form.joiner is not None and JOINT in b"".join(form.joiner(iter([sample])))
    return replace(form, spans_lines=spans)


def _split_header(
    line: str,
    usual: str,
    section: TextFilesSection,
    columns: tuple[str, ...],
    suits: Callable[[tuple[str, ...]], bool],
) -> tuple[str, tuple[str, ...]]:
    """The delimiter, and the fields of the first line with it: as set, else the first that gives what is needed.

    Where none does, the one that gives most fields, for the message.
    """
    tried = [section.delimiter] if section.delimiter else list(dict.fromkeys((usual, *DELIMITERS)))
    for delimiter in tried:
        found = _fields(line, delimiter, section)
        if len(found) == len(columns) if columns else suits(tuple(name.strip() for name in found)):
            return delimiter, found
    most = max(tried, key=lambda delimiter: len(_fields(line, delimiter, section)))
    return most, _fields(line, most, section)


def _found_encoding(head: bytes) -> str:
    """By the byte order mark; without one, UTF-16 shows by the zeros of its first sign, which is of a name."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    return {0: "utf-16-be", 1: "utf-16-le"}.get(head[:2].find(b"\0"), "utf-8")


def _decoded(head: bytes, encoding: str) -> str:
    """The text without its mark; bytes that are not in the encoding become surrogates."""
    errors = "surrogateescape" if "\n".encode(encoding) == b"\n" else "replace"
    return codecs.getincrementaldecoder(encoding)(errors).decode(head).removeprefix("\ufeff")


def _check_encoding(path: str, section_name: str, encoding: str, lines: list[str]) -> None:
    """Raises UserError where the header or most lines are not in the encoding; others are damaged lines, which are
    quarantined. A wrong encoding is not replaced by a guess, which would show in every text."""
    strange = [line for line in lines if _STRANGE.search(line)]
    if len(strange) <= len(lines) // 2 and lines[0] not in strange:
        return
    raw = strange[0].encode(encoding, "surrogateescape")
    header = (
        "the first line is not a header of column names" if lines[0] in strange else f"{raw[:80]!r} is not"
    )
    raise UserError(
        f'{path}: {header} in {encoding.upper()}; set {section_name}.encoding, such as "cp1252", which would read '
        f"{raw.decode('cp1252', 'replace')[:80]!r}"
    )


def _fields(line: str, delimiter: str, section: TextFilesSection) -> tuple[str, ...]:
    """The fields of a line; () where it cannot be read alone."""
    try:
        return tuple(next(csv_reader([line], delimiter, section.quote, section.escape), []))
    except csv.Error:
        return ()
