"""Cells of mapped columns, converted: ids to text, times to seconds, numbers to floats, and lists of these.

A cell that cannot be read makes its row a bad row; it does not stop the run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt
from numpy.typing import NDArray

from dpo4rec_ray.config.data import TimestampUnit
from dpo4rec_ray.datasets.parsing import BAD_NUMBER, BAD_TIME, LEAF, OUT_OF_RANGE, UNREADABLE

Role = Literal["id", "number", "time", "text", "values", "ids", "numbers"]
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
# The elements of the roles that are lists.
_ELEMENT: dict[str, Role] = {"values": "text", "ids": "id", "numbers": "number"}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TRUTHS = {"true": 1.0, "t": 1.0, "false": 0.0, "f": 0.0}
# In a column of single values; among the values of a list "no" is rather a damaged number.
_WORDS = _TRUTHS | {"yes": 1.0, "y": 1.0, "no": 0.0, "n": 0.0}
_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf(inity)?)", re.ASCII | re.I)

# Dates from 1970 on in a line of text, with or without a time.
_ISO_TIME = re.compile(
    r"\b(19[7-9]|20\d)\d-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:?\d\d)?)?(?! ?[\w:])"
)
_WRITTEN_TIME = re.compile(r"\b\d{1,4}([/.-])\d{1,2}\1\d{2,4}( \d{1,2}:\d\d(:\d\d)?( ?[AaPp][Mm])?)?\b")


@dataclass(frozen=True)
class Column:
    """One mapped column.

    Attributes:
        key: of the recipe, such as "table.timestamp".
        name: in the files.
        to: its name after `converted`.
        unit: of a time.
        separator: of several values in one cell.
        optional: left out where the recipe gives no name.
        decimal: what begins the fraction of a number in a text.
        least, most: the range of a number. What is true or false becomes 1 or 0 and has no range.
    """

    key: str
    name: str
    role: Role
    to: str
    unit: TimestampUnit = "s"
    separator: str = ""
    optional: bool = False
    decimal: str = "."
    least: float = -np.inf
    most: float = np.inf


def fits(column: Column, kind: pa.DataType) -> bool:
    if column.role in _ELEMENT:
        if pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind):
            return _fits_scalar(_ELEMENT[column.role], column.unit, kind.value_type)
        if column.role != "values" and is_text(kind):
            return column.separator != ""
        return pt.is_null(kind) or (column.role == "values" and _fits_scalar("text", column.unit, kind))
    return _fits_scalar(column.role, column.unit, kind)


def _fits_scalar(role: Role, unit: TimestampUnit, kind: pa.DataType) -> bool:
    if pt.is_dictionary(kind):
        kind = kind.value_type
    number = pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind)
    time = pt.is_timestamp(kind) or pt.is_date(kind)
    if is_text(kind) or pt.is_null(kind):
        return True
    if role == "time":
        return time or (number and unit in _PER_SECOND)
    if role == "number":
        return number or pt.is_boolean(kind)
    if role == "id":
        return number and not (pt.is_decimal(kind) and kind.scale)
    return number or pt.is_date(kind) or pt.is_boolean(kind)


def is_text(kind: pa.DataType) -> bool:
    return str(kind).removeprefix("large_").removesuffix("_view") in ("string", "binary")


def converted(table: pa.Table, columns: tuple[Column, ...]) -> pa.Table:
    """The mapped columns as text (id, text), float64 (number), int64 seconds (time) or lists of these.

    A cell without a value is null. The column "reason" says what is wrong with a row that has a cell that cannot be
    read, and is null for the other rows.
    """
    arrays: dict[str, pa.Array] = {}
    reason = pa.nulls(table.num_rows, pa.string())
    for column in columns:
        array, bad = _convert(table[column.name].combine_chunks(), column)
        arrays[column.to] = array
        if bad.any():
            element = _ELEMENT.get(column.role, column.role)
            what = {"number": BAD_NUMBER, "time": BAD_TIME}.get(element, UNREADABLE)
            reason = pc.if_else(pa.array(bad), what, reason)
        if column.role == "number":
            outside = _outside(table[column.name].combine_chunks(), array, column)
            reason = pc.if_else(outside, OUT_OF_RANGE, reason) if outside.true_count else reason
    return pa.table({**arrays, "reason": reason})


def _outside(cells: pa.Array, numbers: pa.DoubleArray, column: Column) -> pa.BooleanArray:
    """[rows] whether a number, and no truth value, is out of the column's range. (nan is in none.)"""
    inside = pc.and_(pc.greater_equal(numbers, column.least), pc.less_equal(numbers, column.most))
    outside = pc.fill_null(pc.invert(inside), False)
    if not outside.true_count or pt.is_boolean(cells.type):
        return outside if outside.true_count == 0 else pa.array(np.zeros(len(cells), np.bool_))
    if is_text(cells.type):
        truths = pc.is_in(pc.ascii_lower(_strings(cells)), pa.array(list(_WORDS)))
        outside = pc.and_(outside, pc.invert(truths))
    return outside


def _convert(array: pa.Array, column: Column) -> tuple[pa.Array, NDArray[np.bool_]]:
    """The values, null where there is none, and [rows] which hold something that cannot be read."""
    if column.role not in _ELEMENT:
        values = _scalars(array, column.role, column)
        return values, _unread(array, values)
    element = _ELEMENT[column.role]
    if pt.is_null(array.type):
        array = array.cast(pa.list_(pa.string()))
    if not isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        if column.role != "values":
            array = _parts(_strings(array), column.separator)
            return _convert(array, column)
        texts = _scalars(array, element, column)
        bad = _unread(array, texts)
        if column.separator:
            return pc.split_pattern(texts, column.separator), bad
        offsets = pa.array(np.arange(len(texts) + 1, dtype=np.int32))
        return pa.ListArray.from_arrays(offsets, texts), bad
    array = array.cast(pa.list_(array.type.value_type))
    flat = array.flatten()
    values = _scalars(flat, element, column)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    lists = pa.ListArray.from_arrays(offsets, values, mask=array.is_null())
    return lists, any_of(lists, _unread(flat, values))


def _parts(texts: pa.StringArray, separator: str) -> pa.ListArray:
    """The values in each text, without empty ones. Brackets and quotes go: pandas writes a list as "['a', 'b']"."""
    bracketed = pc.and_(pc.starts_with(texts, "["), pc.ends_with(texts, "]"))
    texts = pc.if_else(bracketed, pc.replace_substring_regex(texts, r"[\[\]'\"]", ""), texts)
    lists = pc.split_pattern(texts, separator)
    values = pc.utf8_trim_whitespace(lists.flatten())
    kept = pc.greater(pc.binary_length(values), 0)
    parents = pc.list_parent_indices(lists).filter(kept).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(np.bincount(parents, minlength=len(lists)))]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, values.filter(kept), mask=lists.is_null())


def any_of(lists: pa.ListArray, elements: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[rows] whether any of a row's elements is marked. elements: [all values of the lists in turn]."""
    rows = pc.list_parent_indices(lists).to_numpy()[elements]
    return np.bincount(rows, minlength=len(lists)) > 0


def _unread(before: pa.Array, after: pa.Array) -> NDArray[np.bool_]:
    lost = pc.and_(after.is_null(), pc.invert(before.is_null(nan_is_null=True)))
    return lost.to_numpy(zero_copy_only=False)


def _scalars(array: pa.Array, role: Role, column: Column) -> pa.Array:
    if pt.is_dictionary(array.type):
        array = array.dictionary_decode()
    if role == "time":
        return _seconds(array, column.unit)
    if role == "number":
        return numbers_of(array, column.decimal, _WORDS if column.role == role else _TRUTHS)
    return _strings(array)


def _strings(array: pa.Array) -> pa.StringArray:
    """Any values as text. 5.0 becomes "5": pandas writes whole ids like that when one of them is null."""
    kind = array.type
    if is_text(kind):
        return _row_safe(array.cast(pa.binary()), lambda a: a.cast(pa.string()), bytes.decode, pa.string())
    if not pt.is_floating(kind):
        return array.cast(pa.string())
    if pt.is_float16(kind):
        array = array.cast(pa.float32())
    numbers = pc.fill_null(array.cast(pa.float64()), np.nan).to_numpy()
    whole = np.isfinite(numbers) & (np.floor(numbers) == numbers) & (np.abs(numbers) < 2**53)
    integers = pa.array(np.where(whole, numbers, 0).astype(np.int64)).cast(pa.string())
    texts = pc.if_else(pa.array(whole), integers, array.cast(pa.string()))
    return pc.if_else(pa.array(np.isfinite(numbers)), texts, None)


def numbers_of(array: pa.Array, decimal: str = ".", truths: dict[str, float] = _TRUTHS) -> pa.DoubleArray:
    """Numbers of any type, or texts of numbers or truth values; null where a text is none of these."""
    if not is_text(array.type):
        return array.cast(pa.float64(), safe=False)
    texts = pc.ascii_trim_whitespace(_strings(array))
    if decimal == ",":
        grouped = pc.match_substring_regex(texts, r"^[+-]?\d{1,3}(\.\d{3})+(,\d*)?$")
        texts = pc.if_else(grouped, pc.replace_substring(texts, ".", ""), texts)
        dotted = pc.match_substring(texts, ".")  # neither a fraction nor a group of thousands
        texts = pc.if_else(dotted, None, pc.replace_substring(texts, ",", "."))
    return _row_safe(
        texts, partial(_plain_numbers, truths=truths), partial(_number, truths=truths), pa.float64()
    )


def _plain_numbers(texts: pa.StringArray, truths: dict[str, float]) -> pa.DoubleArray:
    try:
        return texts.cast(pa.float64())
    except pa.ArrowInvalid:
        place = pc.index_in(pc.ascii_lower(texts), pa.array(list(truths)))
        found = pa.array(list(truths.values())).take(place)
        return pc.coalesce(found, pc.if_else(found.is_valid(), None, texts).cast(pa.float64()))


def _number(text: str, truths: dict[str, float]) -> float | None:
    return float(text) if _NUMBER.fullmatch(text) else truths.get(text.lower())


def _seconds(array: pa.Array, unit: TimestampUnit) -> pa.Int64Array:
    """Seconds since 1970, rounded down. Times without a zone are taken as UTC."""
    kind = array.type
    if pt.is_date(kind):
        return array.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
    if pt.is_timestamp(kind):
        return array.cast(pa.timestamp("s", kind.tz), safe=False).cast(pa.int64())
    if unit == "iso":
        return _row_safe(_strings(array), _iso_times, _iso_time, pa.int64())
    if unit not in _PER_SECOND:
        times = partial(_formatted_times, form=unit), partial(_formatted_time, form=unit)
        return _row_safe(_strings(array), *times, pa.int64())
    numbers = pc.fill_null(numbers_of(array), np.nan).to_numpy() / _PER_SECOND[unit]
    known = np.abs(numbers) < 2**53  # nan is not
    return pa.array(np.floor(np.where(known, numbers, 0)).astype(np.int64), mask=~known)


def _iso_times(texts: pa.StringArray) -> pa.Int64Array:
    try:
        times = texts.cast(pa.timestamp("ns"))
    except pa.ArrowInvalid:
        times = texts.cast(pa.timestamp("ns", "UTC"))
    return times.cast(pa.timestamp("s", times.type.tz), safe=False).cast(pa.int64())


def _iso_time(text: str) -> int | None:
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return ((time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH) // timedelta(seconds=1)


def _formatted_times(texts: pa.StringArray, form: str) -> pa.Int64Array:
    return pc.strptime(pc.ascii_trim_whitespace(texts), format=form, unit="s").cast(pa.int64())


def _formatted_time(text: str, form: str) -> int:
    time = datetime.strptime(text.strip(), form)
    return ((time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH) // timedelta(seconds=1)


def way_to_read_time(line: str) -> str:
    """The unit that reads the first date in a line, as the end of a sentence; "" where there is none."""
    if found := _ISO_TIME.search(line):
        return f', and "iso" would read {found[0]!r}'
    found = _WRITTEN_TIME.search(line)
    text, sign = (found[0], found[1]) if found else ("", "/")
    days = (f"%m{sign}%d{sign}%Y", f"%d{sign}%m{sign}%Y", f"%Y{sign}%m{sign}%d")
    times = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p")
    fitting = [repr(day + time) for day in days for time in times if _fits_form(text, day + time)]
    return f", and {' or '.join(fitting)} would read {text!r}" if fitting else ""


def _fits_form(text: str, form: str) -> bool:
    try:
        return _formatted_time(text, form) >= 0
    except ValueError:
        return False


def _row_safe(
    array: pa.Array, convert: Callable[[pa.Array], pa.Array], one: Callable[[Any], Any], kind: pa.DataType
) -> pa.Array:
    """convert(array). Where pyarrow fails because of a value, each half alone, and at last `one` value after the other."""
    try:
        return convert(array)
    except pa.ArrowInvalid:
        if len(array) > LEAF:
            halves = array[: len(array) // 2], array[len(array) // 2 :]
            return pa.concat_arrays([_row_safe(half, convert, one, kind) for half in halves])
    values: list[Any] = []
    for value in array.to_pylist():
        try:
            values.append(None if value is None else one(value))
        except ValueError:
            values.append(None)
    return pa.array(values, kind)
