"""pyarrow's readers of CSV and JSON lines, held to one row per line, and the reasons why a JSON line cannot be used."""

from __future__ import annotations

import json
import re
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from dpo4rec_ray.datasets.parsing import BAD_JSON, BAD_NUMBER, UNREADABLE, Why

# pyarrow.json 26 reads memory that is not its own at a null outside of an object (apache/arrow#47409).
_STRAY_NULL = re.compile(rb"\}[ \t\r]*null")
_BOM = b"\xef\xbb\xbf"


def read_json(block: bytes, schema: pa.Schema, why: Why) -> pa.Table:
    """The fields of `schema`, one row per line; a field that is not there is null.

    A single line is read by Python's json, which gives up no more of it than it must: a field of another type is null
    too, unless `why` has something against it.

    Raises:
        pyarrow.ArrowInvalid: a line is not one JSON object, or a field has another type.
    """
    if block.find(b"\n") == len(block) - 1:
        return _read_object(block, schema, why)
    num_lines = block.count(b"}\n{") + 1
    if not (block.startswith(b"{") and block.endswith(b"}\n")) or _STRAY_NULL.search(block):
        raise pa.ArrowInvalid("a line does not hold an object alone")
    table = pyarrow.json.read_json(
        pa.BufferReader(block),
        read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
        parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )
    # Every line end is between two objects (it may not stand in a string), so equal numbers mean one on each line.
    if table.num_rows != num_lines:
        raise pa.ArrowInvalid("a line holds several objects")
    return table


def _read_object(line: bytes, schema: pa.Schema, why: Why) -> pa.Table:
    if reason := why(line):
        raise pa.ArrowInvalid(reason)
    record = _decoded(line)
    return pa.table([_value(record.get(field.name), field.type) for field in schema], schema=schema)


def _decoded(line: bytes) -> Any:
    # pyarrow does not look at the encoding of fields that nobody asked for; neither may this.
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
    if block.startswith(_BOM):  # pyarrow would take one off, from this line and from no other
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
