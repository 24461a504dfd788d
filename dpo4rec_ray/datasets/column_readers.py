"""Blocks of CSV and JSON lines as converted columns: exactly one row per line, or a reason."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.types as pt

from dpo4rec_ray.datasets import parsing
from dpo4rec_ray.datasets.cells import Column, converted, fits
from dpo4rec_ray.datasets.parsing import LEAF, UNREADABLE

_STRAY_NULL = re.compile(rb"\}[ \t\r]*null")
_BOM = b"\xef\xbb\xbf"
# What a bad line makes the readers raise.
REFUSED = (pa.ArrowException, ValueError, TypeError, RecursionError)


@dataclass(frozen=True)
class CsvReader:
    """Lines of a file with this header; one line is one row, so a quoted line break is damage."""

    header: tuple[str, ...]
    delimiter: str
    columns: tuple[Column, ...]

    def read(self, block: bytes) -> pa.Table:
        """Whole lines -> converted columns. Raises one of REFUSED when any line cannot be read as one row."""
        if b"\r" in block:
            raise pa.ArrowInvalid("a carriage return within a line would end it")
        # Quotes left open join lines, and nothing left can split one: so every line is its own row exactly when the
        # counts agree. The line put after the last shows whether the last one's quotes are closed.
        guard = self.delimiter.join("0" * len(self.header)).encode() + b"\n"
        places = {column.name: str(self.header.index(column.name)) for column in self.columns}
        table = pyarrow.csv.read_csv(
            pa.BufferReader((_BOM if block.startswith(_BOM) else b"") + block + guard),  # it takes one off
            read_options=pyarrow.csv.ReadOptions(
                column_names=[str(place) for place in range(len(self.header))],
                use_threads=False,
                block_size=len(_BOM) + len(block) + len(guard) + 1,
            ),
            parse_options=pyarrow.csv.ParseOptions(delimiter=self.delimiter, ignore_empty_lines=False),
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
        return converted(table.rename_columns(list(places)).slice(0, num_lines), self.columns)

    def why(self, line: bytes) -> str:
        """Reason why one line cannot be read, "" when it can."""
        try:  # Python's reader first: pyarrow takes a millisecond to start
            fields = next(csv.reader([line.decode()], delimiter=self.delimiter, strict=True))
            if len(fields) == len(self.header) and b"\r" not in line:
                return ""
            reason = parsing.FIELD_COUNT if b"\r" not in line else UNREADABLE
        except (ValueError, csv.Error, StopIteration):
            reason = UNREADABLE
        return "" if _can(self.read, line) else reason


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
        # pyarrow reads objects, not lines: it takes two per line, or one over two lines. Where every line is {...},
        # each line end lies between two objects. A null outside of one can end the process (apache/arrow #47409).
        content = np.frombuffer(block, dtype=np.uint8)
        ends = np.flatnonzero(content == ord("\n"))
        starts = np.concatenate([[0], ends[:-1] + 1])
        braced = np.all(content[starts] == ord("{")) and np.all(content[ends - 1] == ord("}"))
        if not braced or _STRAY_NULL.search(block):
            raise pa.ArrowInvalid("a line is not one JSON object")
        table = pyarrow.json.read_json(
            pa.BufferReader(block),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=self.schema, unexpected_field_behavior="ignore"
            ),
        )
        table.validate(full=True)
        if table.num_rows != len(ends):
            raise pa.ArrowInvalid("a line holds more than one JSON object")
        return table

    def _read_slowly(self, block: bytes) -> pa.Table:
        """For lines whose values are of other types than the first lines' (an id of 5 beside one of "x5")."""
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
            return UNREADABLE if isinstance(json.loads(line.decode()), dict) else parsing.BAD_JSON
        except (ValueError, RecursionError):
            return parsing.BAD_JSON


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
