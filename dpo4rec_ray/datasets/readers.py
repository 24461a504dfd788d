"""pyarrow's readers of CSV and JSON lines, held to exactly one row per line, and the reason why a line cannot be read.

`read_csv` and `read_json` are for files whose columns are known, `CsvReader` and `JsonReader` for mapped columns.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.types as pt

from dpo4rec_ray.datasets.cells import Column, converted, fits
from dpo4rec_ray.datasets.csv_form import CsvForm
from dpo4rec_ray.datasets.csv_rows import JOINT
from dpo4rec_ray.datasets.parsing import (
    BAD_JSON,
    BAD_NUMBER,
    FIELD_COUNT,
    LEAF,
    OPEN_QUOTE,
    REFUSED,
    UNREADABLE,
    WRONG_ENCODING,
    Why,
)

# pyarrow.json 26 reads memory that is not its own at a null outside of an object (apache/arrow#47409).
_STRAY_NULL = re.compile(rb"\}[ \t\r]*null")
_BOM = b"\xef\xbb\xbf"


def read_json(block: bytes, schema: pa.Schema, why: Why) -> pa.Table:
    """The fields of `schema`, one row per line; a field that is not there is null.

    A single line is read by Python's json, which is more patient: a field of another type becomes null, unless `why` has
    a reason against the line.

    Raises:
        pyarrow.ArrowInvalid: a line is not one JSON object, or a field has another type.
    """
    if block.find(b"\n") == len(block) - 1:
        return _read_object(block, schema, why)
    return _json_table(block, schema)


def _json_table(block: bytes, schema: pa.Schema) -> pa.Table:
    """The fields of `schema` of several lines. pyarrow reads objects, not lines: two in a line, or one over two lines.

    A JSON string cannot contain a line end. So each line holds one object if there are as many objects as lines, and
    every line end lies between two objects.
    """
    num_lines = block.count(b"\n")
    between = block.count(b"}\n{") == num_lines - 1 and block.startswith(b"{") and block.endswith(b"}\n")
    if not between or _STRAY_NULL.search(block):
        raise pa.ArrowInvalid("a line is not one JSON object")
    table = pyarrow.json.read_json(
        pa.BufferReader(block),
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )
    if table.num_rows != num_lines:
        raise pa.ArrowInvalid("a line holds several objects")
    return table


def _read_object(line: bytes, schema: pa.Schema, why: Why) -> pa.Table:
    if reason := why(line):
        raise pa.ArrowInvalid(reason)
    record = _decoded(line)
    return pa.table([_value(record.get(field.name), field.type) for field in schema], schema=schema)


def _decoded(line: bytes) -> Any:
    # pyarrow does not check the encoding of fields that are not read; this must not either.
    return json.loads(line.decode("utf-8", "surrogateescape"))


def _value(value: Any, dtype: pa.DataType) -> pa.Array:
    """[1] the value, or null where it is of another type; of a list, the texts."""
    if pa.types.is_list(dtype):
        texts = value if isinstance(value, list) else []
        value = [text if isinstance(text, str) else None for text in texts]
    try:
        return pa.array([value], dtype)
    except (pa.ArrowException, ValueError):
        return pa.nulls(1, dtype)


def why_json(line: bytes, texts: tuple[str, ...], numbers: tuple[tuple[str, bool], ...] = ()) -> str:
    """Why a line is not an object with these fields, or "". numbers: (name, whole). A field may be missing."""
    try:
        record = _decoded(line)
    except (ValueError, RecursionError):
        return BAD_JSON
    if not isinstance(record, dict):
        return BAD_JSON
    for name in texts:
        text = record.get(name)
        if text is not None and _value(text, pa.string()).null_count:
            return UNREADABLE
    for name, whole in numbers:
        number = record.get(name)
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int if whole else (int, float)):
            return BAD_NUMBER
        if abs(number) >= 2**63:
            return BAD_NUMBER
    return ""


def read_csv(block: bytes, columns: dict[str, pa.DataType]) -> pa.Table:
    """The columns, one row per line; no quotes.

    Raises:
        pyarrow.ArrowInvalid: a line with other fields.
    """
    if block.startswith(_BOM):  # pyarrow removes one at the start of what it reads
        block = _BOM + block
    return pyarrow.csv.read_csv(
        pa.BufferReader(block),
        read_options=pyarrow.csv.ReadOptions(
            use_threads=False, block_size=len(block) + 1, column_names=list(columns)
        ),
        parse_options=pyarrow.csv.ParseOptions(quote_char=False, ignore_empty_lines=False),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=columns, null_values=[], strings_can_be_null=False
        ),
    )


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The column in one piece."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


@dataclass(frozen=True)
class CsvReader:
    """Lines of a file of this form, each of them one row. joined: line breaks within rows were replaced by JOINT."""

    form: CsvForm
    columns: tuple[Column, ...]
    joined: bool = False

    def read(self, block: bytes) -> pa.Table:
        """Whole lines -> converted columns. Raises one of REFUSED when any line cannot be read as one row."""
        if b"\r" in block:  # pyarrow would end a row there
            return converted(self._read_alone(block), self.columns)
        # An open quote joins lines, and nothing can split one. So each line is one row exactly when the numbers of lines
        # and rows are equal. A guard line at the end shows whether the quotes of the last line are closed.
        form = self.form
        guard = form.delimiter.join("0" * len(form.columns)).encode() + b"\n"
        places = {column.name: str(form.columns.index(column.name)) for column in self.columns}
        table = pyarrow.csv.read_csv(
            pa.BufferReader((_BOM if block.startswith(_BOM) else b"") + block + guard),  # pyarrow removes one
            read_options=pyarrow.csv.ReadOptions(
                column_names=[str(place) for place in range(len(form.columns))],
                use_threads=False,
                block_size=len(_BOM) + len(block) + len(guard) + 1,
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=form.delimiter,
                quote_char=form.quote or False,
                escape_char=form.escape or False,
                ignore_empty_lines=False,
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={place: pa.string() for place in places.values()},
                include_columns=list(places.values()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
        num_lines = block.count(b"\n")
        if table.num_rows != num_lines + 1:
            raise pa.ArrowInvalid("a quote is not closed in its line")
        table = table.rename_columns(list(places)).slice(0, num_lines)
        if form.padded:
            table = _each(table, pc.utf8_trim_whitespace)
        if self.joined and JOINT in block:
            table = _each(table, _with_line_breaks)
        return converted(table, self.columns)

    def _read_alone(self, line: bytes) -> pa.Table:
        """One line, which may hold a carriage return between quotes."""
        if line.count(b"\n") > 1:
            raise pa.ArrowInvalid("several lines with a carriage return")
        try:
            ((*fields,),) = self.form.reader([line.decode()])
        except (csv.Error, ValueError) as error:
            raise pa.ArrowInvalid(str(error)) from None
        if len(fields) != len(self.form.columns):
            raise pa.ArrowInvalid(FIELD_COUNT)
        cells = {column.name: fields[self.form.columns.index(column.name)] or None for column in self.columns}
        return pa.table({name: pa.array([cell], pa.string()) for name, cell in cells.items()})

    def why(self, line: bytes) -> str:
        """Reason why one line cannot be read, "" when it can."""
        try:  # Python's reader first: pyarrow takes a millisecond to start
            fields = next(self.form.reader([line.decode()]))
            if len(fields) == len(self.form.columns):
                return ""
            reason = FIELD_COUNT
        except csv.Error as error:
            reason = OPEN_QUOTE if "unexpected end" in str(error) else UNREADABLE
        except UnicodeDecodeError:
            reason = WRONG_ENCODING
        except StopIteration:
            reason = UNREADABLE
        return "" if _can(self.read, line) else reason


def _each(table: pa.Table, function: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> pa.Table:
    return pa.table({name: function(table[name]) for name in table.column_names})


def _with_line_breaks(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    joint = JOINT.decode()
    if not pc.any(pc.match_substring(texts, joint)).as_py():
        return texts
    return pc.replace_substring(texts, joint, "\n")


@dataclass(frozen=True)
class JsonReader:
    """Lines of one JSON object each; schema: the mapped columns as the file's first lines hold them."""

    schema: pa.Schema
    columns: tuple[Column, ...]

    def read(self, block: bytes) -> pa.Table:
        """Whole lines -> converted columns. Raises one of REFUSED when any line cannot be read as one row."""
        try:
            return converted(self._read_fast(block), self.columns)
        except REFUSED:
            if block.count(b"\n") > LEAF:
                raise
            return converted(self._read_slowly(block), self.columns)

    def _read_fast(self, block: bytes) -> pa.Table:
        table = _json_table(block, self.schema)
        table.validate(full=True)
        return table

    def _read_slowly(self, block: bytes) -> pa.Table:
        """For lines whose values have other types than in the first lines, such as an id 5 where others are "x5"."""
        objects = [json.loads(line.decode()) for line in block.removesuffix(b"\n").split(b"\n")]
        if not all(isinstance(value, dict) for value in objects):
            raise pa.ArrowInvalid("a line is not a JSON object")
        arrays: list[pa.Array] = []
        for name, kind in zip(self.schema.names, self.schema.types, strict=True):
            array = pa.array([_json_text(value.get(name)) for value in objects])
            empty = pt.is_null(array.type.value_type if pt.is_list(array.type) else array.type)
            plain = pa.list_(pa.string()) if pt.is_list(kind) else pa.string()
            arrays.append(array.cast(plain) if empty else array)
        table = pa.table(arrays, names=self.schema.names)
        if not all(fits(column, table.schema.field(column.name).type) for column in self.columns):
            raise pa.ArrowInvalid("a list where one value belongs, or the other way round")
        return table

    def why(self, line: bytes) -> str:
        """Reason why one line cannot be read, "" when it can."""
        if _can(self._read_slowly, line) or _can(self._read_fast, line):
            return ""
        try:
            return UNREADABLE if isinstance(json.loads(line.decode()), dict) else BAD_JSON
        except (ValueError, RecursionError):
            return BAD_JSON


def _can(read: Callable[[bytes], pa.Table], line: bytes) -> bool:
    try:
        read(line + b"\n")
    except REFUSED:
        return False
    return True


def _json_text(value: Any) -> Any:
    """A JSON value as text, a list as a list of texts; null stays."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [_json_text(element) for element in value]
        if any(isinstance(text, list) for text in texts):
            raise pa.ArrowInvalid("a list within a list")
        return texts
    if isinstance(value, dict):
        raise pa.ArrowInvalid("an object within an object")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, allow_nan=False)
