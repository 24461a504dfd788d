"""Files with mapped columns: found by a pattern, checked by their headers, and given their parsers."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq
import pyarrow.types as pt

from dpo4rec_ray.config.data import TextFilesSection
from dpo4rec_ray.datasets import files
from dpo4rec_ray.datasets.cells import Column, converted, fits, is_text
from dpo4rec_ray.datasets.csv_form import DELIMITERS, CsvForm, find_form
from dpo4rec_ray.datasets.csv_rows import lines_counted
from dpo4rec_ray.datasets.parsing import EMPTY_LINE, OPEN_QUOTE, REFUSED, Origin, parsed_lines
from dpo4rec_ray.datasets.readers import CsvReader, JsonReader
from dpo4rec_ray.datasets.source import BadRows, DataFile, Parsed
from dpo4rec_ray.errors import UserError

_FORMATS = {
    ".parquet": "parquet",
    ".csv": ",",
    ".tsv": "\t",
    ".txt": ",",
    ".inter": "\t",
    ".item": "\t",
    ".user": "\t",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
}
_WANTED = {
    "id": "text or whole numbers",
    "number": "numbers",
    "time": "numbers or times",
    "text": "text or numbers",
    "values": "text, numbers or lists of them",
    "ids": "lists of text or whole numbers",
    "numbers": "lists of numbers",
}

# From converted columns to the columns that the stage needs.
Finish = Callable[[pa.Table, Origin], Parsed]


def data_files(
    folder: str,
    pattern: str | tuple[str, ...],
    key: str,
    columns: tuple[Column, ...],
    finish: Finish,
    text: TextFilesSection,
    names: tuple[str, ...] = (),
) -> tuple[DataFile, ...]:
    """The files that `pattern` matches, each with its parser.

    Args:
        pattern: files come by name; those of several patterns come in the order of the patterns.
        key: the recipe key of the pattern.
        finish: picklable.
        text: how CSV is written.
        names: of the columns of CSV without a header; none: the first line holds them.

    Raises:
        UserError: no file matches, a format is unknown, or a column is missing or has a type that does not fit.
    """
    columns = tuple(column for column in columns if column.name or not column.optional)
    patterns = (pattern,) if isinstance(pattern, str) else pattern
    paths = [path for one in patterns for path in matching_files(folder, one, key)]
    if len(paths) > 1:  # some writers leave empty files, without a header
        paths = [path for path in paths if not files.is_empty(path)] or paths
    with ThreadPoolExecutor(16) as pool:  # the header of a remote file takes one or two requests
        return tuple(pool.map(lambda path: _data_file(path, key, columns, finish, text, names), paths))


def matching_files(folder: str, pattern: str, key: str) -> list[str]:
    """Paths or URIs of the files below a folder that a pattern (*, ? and [...] within names) matches, by name.

    Raises:
        UserError: there is none, or a folder cannot be listed.
    """
    parts = [part for part in pattern.split("/") if part]
    if not parts:
        raise UserError(
            f'{key} is not set; name a file below the raw folder, or a pattern such as "events/*.parquet"'
        )
    folder = folder or "."
    if Path(folder).expanduser().is_file():
        raise UserError(f"{folder}: is a file; give its folder, {Path(folder).parent}")
    try:
        found = _expand(folder, parts)
        there = "" if found else ", ".join(name for name, _ in _entries(folder)[:20])
    except UserError:
        raise
    except Exception as error:  # the file systems of fsspec have their own exceptions
        raise UserError(f"{folder}: {key} = {pattern!r} cannot be listed ({error})") from None
    if not found:
        if not _exists(folder):
            raise UserError(f"{folder}: there is no such folder; correct data.raw_dir")
        raise UserError(
            f"{folder}: no file matches {key} = {pattern!r}; the folder holds: {there or 'nothing'}"
        )
    return sorted(found)


def _expand(folder: str, parts: list[str]) -> list[str]:
    found = [folder]
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        if not any(sign in part for sign in "*?["):
            found = [
                path for path in (files.join(path, part) for path in found) if not last or _is_file(path)
            ]
            continue
        entries = [(path, name) for path in found for name, is_file in _entries(path) if is_file == last]
        found = [files.join(path, name) for path, name in entries if fnmatchcase(name, part)]
    return found


def _entries(folder: str) -> list[tuple[str, bool]]:
    """(name, is a file) of the visible entries of a folder, by name; none when there is no such folder."""
    filesystem, inner = files.open_filesystem(folder)
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(inner, allow_not_found=True))
    names = [(PurePosixPath(info.path).name, info.is_file) for info in found]
    return sorted(entry for entry in names if not entry[0].startswith("."))


def _exists(path: str) -> bool:
    filesystem, inner = files.open_filesystem(path)
    return filesystem.get_file_info(inner).type != pyarrow.fs.FileType.NotFound


def _is_file(path: str) -> bool:
    filesystem, inner = files.open_filesystem(path)
    return filesystem.get_file_info(inner).is_file


def _data_file(
    path: str,
    key: str,
    columns: tuple[Column, ...],
    finish: Finish,
    text: TextFilesSection,
    names: tuple[str, ...],
) -> DataFile:
    name = PurePosixPath(files.without_query(path))
    suffix = (name.with_suffix("") if files.compression_of(name.name) else name).suffix.lower()
    form = _FORMATS.get(suffix)
    if form is None or (form == "parquet" and files.compression_of(name.name)):
        raise UserError(
            f"{path}: the format is not known; known: {', '.join(_FORMATS)}, text also with .gz, .bz2, .zst"
        )
    if form == "parquet":
        _check(path, _parquet_schema(path), columns)
        names = tuple(dict.fromkeys(column.name for column in columns))
        return DataFile(
            path, partial(parse_rows, columns=columns, finish=finish), kind="parquet", columns=names
        )
    if form == "json":
        reader = JsonReader(_json_schema(path, columns), columns)
        return DataFile(path, partial(parse_block, reader=reader, finish=finish))
    wanted = {column.name for column in columns}
    csv_form = find_form(path, form, text, key.partition(".")[0], names, wanted.issubset)
    names_key = "logged.columns" if key == "logged.file" else f"{key.removesuffix('s')}_columns"
    advice = "" if names else f"; if the first line is no header, name the columns in {names_key}"
    if any(sign in name for name in csv_form.columns for sign in DELIMITERS):
        advice = f"; if that is several columns, set {key.partition('.')[0]}.delimiter"
    _check(path, pa.schema([(name, pa.string()) for name in csv_form.columns]), columns, advice)
    file = DataFile(
        path,
        partial(parse_block, reader=CsvReader(csv_form, columns), finish=finish),
        header=csv_form.has_header,
        stream_encoding=csv_form.stream_encoding,
        note=csv_form.note,
    )
    if not csv_form.joiner:
        return file
    parse = partial(parse_block, reader=CsvReader(csv_form, columns, joined=True), finish=finish)
    over_lines = replace(file, parse=parse, join=csv_form.joiner)
    return over_lines if csv_form.spans_lines else replace(file, over_lines=over_lines)


def _parquet_schema(path: str) -> pa.Schema:
    filesystem, inner = files.open_filesystem(path)
    try:
        with filesystem.open_input_file(inner) as handle:
            return pq.read_schema(handle)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({error})") from None


def _json_schema(path: str, columns: tuple[Column, ...]) -> pa.Schema:
    """The types of the mapped columns: per column, that of the first value that fits its role. Reads the first lines alone."""
    head = files.read_blocks(files.Split(0, path, 0, 0, whole=True, order=0, size=0), DataFile(path), 2**16)
    objects: list[dict[str, Any]] = []
    for line in next((block.content for block in head), b"").split(b"\n"):
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        objects += [value] if isinstance(value, dict) else []
    if not objects:
        raise UserError(f"{path}: its first lines hold no JSON object; write one object per line")
    types: dict[str, pa.DataType] = {}
    for name in dict.fromkeys(name for row in objects for name in row):
        column = next((column for column in columns if column.name == name), None)
        if column is None:
            types[name] = pa.null()
            continue
        seen = [_json_type(row[name]) for row in objects if row.get(name) is not None]
        known = [kind for kind in seen if kind not in (pa.null(), pa.list_(pa.null()))]
        fitting = (kind for kind in known if fits(column, kind))
        types[name] = next(fitting, known[0] if known else pa.null())
    _check(path, pa.schema(types.items()), columns)
    return pa.schema([(name, _read_as(name, types[name], columns)) for name in {c.name: 0 for c in columns}])


def _json_type(value: Any) -> pa.DataType:
    try:
        return pa.array([value]).type
    except REFUSED:  # a huge number, or a list of several types
        return pa.null()


def _read_as(name: str, kind: pa.DataType, columns: tuple[Column, ...]) -> pa.DataType:
    """The type with which a JSON column is read: a column of numbers may hold both 5 and 4.5."""
    roles = {column.role for column in columns if column.name == name}
    listed = pt.is_list(kind)
    kind = kind.value_type if listed else kind
    if pt.is_null(kind):
        kind, listed = pa.string(), bool(roles & {"ids", "numbers"})
    if pt.is_integer(kind) and roles <= {"number", "time", "numbers"}:
        kind = pa.float64()
    return pa.list_(kind) if listed else kind


def _check(path: str, schema: pa.Schema, columns: tuple[Column, ...], if_missing: str = "") -> None:
    for column in columns:
        places = schema.get_all_field_indices(column.name)
        if len(places) != 1:
            what = "is there twice" if places else "is not there"
            found = ", ".join(name or '""' for name in dict.fromkeys(schema.names)) or "none"
            raise UserError(
                f"{path}: the column {column.name!r} ({column.key}) {what}; columns found: {found}"
                + ("" if places else _way_out(column, schema.names, if_missing))
            )
        kind = schema.field(places[0]).type
        if not fits(column, kind):
            counted = column.role == "time" and pt.is_primitive(kind)
            advice = "; set timestamp_unit to s, ms, us or ns" if counted else ""
            if column.role in ("ids", "numbers") and is_text(kind):
                advice = ", or set the separator of lists that are written as one text"
            raise UserError(
                f"{path}: the column {column.name!r} ({column.key}) is of type {kind}; it must hold "
                f"{_WANTED[column.role]}{advice}"
            )


def _way_out(column: Column, found: list[str], if_missing: str) -> str:
    """What to do about a column that a file lacks."""
    section, _, name = column.key.partition(".")
    if found[:1] == [""] and not column.optional:  # the index, which pandas writes first
        return f'; if the column without a name is meant, set {column.key}=""'
    if column.key == "table.rating":
        return '; without ratings set table.rating="" and data.positive_rating=1'
    if name.startswith("attributes."):
        return f"; name another one, or read no attributes with {section}.attributes={{}}"
    without = f', or to "" if there is none ({column.key}=)' if column.optional else ""
    return f"; set {column.key} to the name that it has there{without} (`dpo4rec config {section}` explains the keys){if_missing}"


def parse_block(block: bytes, *, reader: CsvReader | JsonReader, finish: Finish) -> Parsed:
    """Parse a block of lines."""
    csv_form = reader.form if isinstance(reader, CsvReader) else None
    if csv_form and csv_form.encoding != "utf-8":
        block = block.decode(csv_form.encoding, "surrogateescape").encode("utf-8", "surrogateescape")
    table, origin = parsed_lines(block, reader.read, reader.why)
    if not table.num_rows:
        table = converted(pa.table({c.name: pa.nulls(0) for c in reader.columns}), reader.columns)
    if csv_form:
        table = _without_words(table, origin, csv_form)
    parsed = finish(*_set_aside(table, origin))
    if not (csv_form and csv_form.joiner):
        return parsed
    if reader.joined:
        return lines_counted(parsed, block)
    unclosed = origin.bad_rows.counts[OPEN_QUOTE] > 0
    return replace(parsed, spans_lines=unclosed and csv_form.joiner.finds_any(block))


def _without_words(table: pa.Table, origin: Origin, csv_form: CsvForm) -> pa.Table:
    """Mark the lines of delimiters alone as empty: spreadsheets end their files with them."""
    empty = np.ones(table.num_rows, np.bool_)
    for name in table.column_names:
        empty &= table[name].is_null().to_numpy()
    signs = f"{csv_form.delimiter}{csv_form.quote} \t".encode()
    for place in np.flatnonzero(empty):
        empty[place] = not bytes(origin.text_of(origin.rows[place])).strip(signs)
    if not empty.any():
        return table
    reason = pc.if_else(pa.array(empty), EMPTY_LINE, table["reason"])
    return table.set_column(table.column_names.index("reason"), "reason", reason)


def parse_rows(table: pa.Table, *, columns: tuple[Column, ...], finish: Finish) -> Parsed:
    """Parse a row group of a Parquet file."""
    mapped = table.select(list(dict.fromkeys(column.name for column in columns)))

    def text_of(row: int) -> str:
        return ", ".join(f"{name}={_shown(mapped[name][row])}" for name in mapped.column_names)

    origin = Origin(np.arange(table.num_rows), table.num_rows, BadRows(), text_of)
    return finish(*_set_aside(converted(mapped, columns), origin))


def _shown(cell: pa.Scalar) -> str:
    try:
        return repr(cell.as_py())
    except (ValueError, OverflowError):  # text that is not UTF-8, or a time that Python cannot represent
        return repr(cell.as_buffer().to_pybytes()) if is_text(cell.type) else f"<{cell.type}>"


def _set_aside(table: pa.Table, origin: Origin) -> tuple[pa.Table, Origin]:
    """Quarantine the rows with a reason; return the others and their origin."""
    reasons = table["reason"]
    for reason in pc.drop_null(pc.unique(reasons)).to_pylist():
        places = np.flatnonzero(pc.fill_null(pc.equal(reasons, reason), False).to_numpy())
        origin.quarantine(places, reason)
    good = pc.is_null(reasons)
    return table.drop_columns("reason").filter(good), origin._replace(rows=origin.rows[good.to_numpy()])
