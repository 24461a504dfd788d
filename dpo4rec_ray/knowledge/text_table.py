"""Texts written elsewhere: read from a file once, then found by user or item id without holding them in memory.

There are three layouts, and the file's name tells which. `.parquet` and `.jsonl` (`.ndjson`): one row per text, with a
column for the id and one for the text; several rows of an id are its samples in file order. `.klg` (`.json`): KAR's
published `user.klg` and `item.klg`, one JSON object of id -> {"prompt", "ans"}. In later files the key is "answer", or
the value is the text itself. The prompt is not read.

Ids are those of the raw data, before users and items are numbered: strings, or integers, which are read as their digits.
KAR's published files have the raw ids of MovieLens and Amazon as keys. Files that were generated from KAR's own
`prompt.hist` have KAR's running numbers instead, which are other users here: translate them with its `datamaps.json`.

Nothing in a file is trusted: a row that is not an id with a text is left out, counted, and reported with its place.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo4rec_ray.core.joins import NUM_COMPARED, JoinSide, check_join, way_to_match
from dpo4rec_ray.core.keys import keys_of
from dpo4rec_ray.errors import UserError, first_line
from dpo4rec_ray.storage.local_copies import local_copy
from dpo4rec_ray.storage.parquet import opened
from dpo4rec_ray.storage.places import Place, new_file

JSON_LINES, KLG = (".jsonl", ".ndjson"), (".klg", ".json")
ANSWERS = ("ans", "answer")  # the key of the text in KAR's files, and in later ones
NOT_JSON, NO_ID, NO_TEXT = "not a JSON object", "no id", "no text"
UNKNOWN = "unknown id"
_BATCH = 4096  # texts that are held at a time
_LOOKED_AT = 100  # lines in which the columns must be found
_MAX_SHOWN = 3  # places in a message, per reason
_IDENTITY = b"made_from"
_SCHEMA = pa.schema([("subject_id", pa.int64()), ("text", pa.large_string())])

Rows = list[tuple[Any, Any, str]]  # id and text as found, and where


@dataclass
class TextCounts:
    """What was in a file. left_out: reason -> rows; shown: reason -> the first places, in words."""

    texts: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, where: str) -> None:
        self.left_out[reason] += 1
        places = self.shown.setdefault(reason, [])
        if len(places) < _MAX_SHOWN:
            places.append(where)

    @property
    def words(self) -> str:
        """'3 x no text (line 7, line 9, line 12), ...'"""
        return ", ".join(
            f"{count} x {reason} ({', '.join(self.shown[reason])}{', ...' if count > _MAX_SHOWN else ''})"
            for reason, count in self.left_out.items()
        )


def check_text_file(key: str, path: str, id_column: str, text_column: str) -> None:
    """Look at the file before anything starts. key: of the recipe, for messages.

    Raises:
        UserError: no such file, an unknown layout, or a missing column.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key} {path}: no such file")
    wanted = (id_column, text_column)
    if file.suffix == ".parquet":
        try:
            found = pq.read_schema(file).names
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{key} {path}: not a Parquet file ({first_line(error)})") from None
    elif file.suffix in JSON_LINES:
        found: list[str] = []
        for number, (_, line) in enumerate(_lines(file)):
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                found += [name for name in (row if isinstance(row, dict) else ()) if name not in found]
            if number >= _LOOKED_AT or all(column in found for column in wanted):
                break
    elif file.suffix in KLG:
        return
    else:
        known = ", ".join((".parquet", *JSON_LINES, *KLG))
        raise UserError(f"{key} {path}: texts are read from {known}, not from {file.suffix or 'such a file'}")
    for column in wanted:
        if column not in found:
            raise UserError(
                f"{key} {path}: no column {column!r} (found: {', '.join(map(str, found[:20])) or 'none'}); "
                "set texts.user, texts.item and texts.text to its columns"
            )


def place_texts(
    source: str,
    columns: tuple[str, str],
    raw_ids: pa.Array,
    subject_ids: np.ndarray,
    target: Place,
    identity: str,
) -> TextCounts | None:
    """Write the texts of known ids to `target`, where a `TextTable` finds them; None where that was done before.

    Args:
        columns: names of the id and of the text, for Parquet and JSONL.
        raw_ids: known ids [S], at least one, strings.
        subject_ids: their numbers [S].
        identity: of the file and of the ids. A target that was made from the same identity is kept.

    Raises:
        UserError: the file cannot be read at all, or almost none of its ids is known.
    """
    if _identity_of(target) == identity:
        return None
    counts = TextCounts()
    described = np.zeros(len(raw_ids), dtype=np.bool_)
    strange: list[str] = []
    known_keys = keys_of(raw_ids)
    order = np.argsort(known_keys)
    sorted_keys = known_keys[order]
    target.parent.mkdir(parents=True, exist_ok=True)
    schema = _SCHEMA.with_metadata({_IDENTITY: identity.encode()})
    with new_file(target) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for rows in _batches(Path(source).expanduser(), columns, counts):
                ids, texts, places = _usable(rows, counts)
                keys = keys_of(pa.array(ids, pa.string()))
                found = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
                known = sorted_keys[found] == keys
                for at in np.flatnonzero(~known):
                    counts.leave_out(UNKNOWN, f"{places[at]}: {ids[at][:40]!r}")
                    strange += [ids[at]] if len(strange) < NUM_COMPARED else []
                described[order[found[known]]] = True
                numbers = subject_ids[order[found[known]]]
                batch = [
                    pa.array(numbers, pa.int64()),
                    pa.array(texts, pa.large_string()).filter(pa.array(known)),
                ]
                counts.texts += len(numbers)
                writer.write_batch(pa.record_batch(batch, schema=schema))
        if not counts.texts:
            hint = f"; the data has ids such as {', '.join(map(repr, raw_ids.slice(0, 3).to_pylist()))}"
            hint += way_to_match(strange, raw_ids.slice(0, NUM_COMPARED).to_pylist())
            raise UserError(
                f"{source}: holds no text that can be used: {counts.words or 'it is empty'}"
                + (hint if counts.left_out[UNKNOWN] else "")
            )
        check_join(
            "raw",
            int(described.sum()),
            JoinSide("the data", len(raw_ids), raw_ids.slice(0, NUM_COMPARED).to_pylist),
            JoinSide(source, counts.texts + counts.left_out[UNKNOWN], lambda: strange),
        )
    return counts


class TextTable:
    """Texts by subject id, read from a mapped file when they are asked for."""

    def __init__(self, file: Path):
        """file: as `place_texts` wrote it."""
        table = pa.ipc.open_file(pa.memory_map(str(local_copy(file)))).read_all()
        ids = table["subject_id"].to_numpy()
        self._texts = table["text"]
        self._rows = np.argsort(ids, kind="stable")  # samples stay in file order
        self._ids = ids[self._rows]

    def of(self, subject_id: int, count: int) -> list[str]:
        """The first `count` texts of a subject, or as many as there are."""
        low, high = np.searchsorted(self._ids, [subject_id, subject_id + 1])
        return [self._texts[int(row)].as_py() for row in self._rows[low : min(high, low + count)]]


def _usable(rows: Rows, counts: TextCounts) -> tuple[list[str], list[str], list[str]]:
    """Ids, texts and places of the rows that hold both."""
    ids: list[str] = []
    texts: list[str] = []
    places: list[str] = []
    for raw_id, text, where in rows:
        name = str(raw_id) if isinstance(raw_id, int) and not isinstance(raw_id, bool) else raw_id
        if not _is_text(name):
            counts.leave_out(NO_ID, where)
        elif not _is_text(text):
            counts.leave_out(NO_TEXT, where)
        else:
            ids.append(name)
            texts.append(text)
            places.append(where)
    return ids, texts, places


def _is_text(value: Any) -> bool:
    """Whether it is a string with more than spaces that can be stored: strings of JSON may hold halves of characters."""
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _batches(file: Path, columns: Sequence[str], counts: TextCounts) -> Iterator[Rows]:
    """All rows of a file, in batches; lines that are not rows are counted.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if file.suffix == ".parquet":
            yield from _parquet_batches(file, columns)
            return
        rows = _klg_rows(file) if file.suffix in KLG else _json_rows(file, columns, counts)
        batch: Rows = []
        for row in rows:
            batch.append(row)
            if len(batch) >= _BATCH:
                yield batch
                batch = []
        yield batch
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read, or is damaged ({first_line(error)})") from None


def _parquet_batches(file: Path, columns: Sequence[str]) -> Iterator[Rows]:
    number = 0
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=_BATCH, columns=list(columns)):
            ids, texts = (_values(batch.column(column)) for column in columns)
            yield [
                (raw_id, text, f"row {number + place}")
                for place, (raw_id, text) in enumerate(zip(ids, texts, strict=True), start=1)
            ]
            number += len(ids)


def _values(column: pa.Array) -> list[Any]:
    """A column as Python values; None for strings that are not UTF-8, which Arrow does not check when it reads."""
    with suppress(UnicodeDecodeError):
        return column.to_pylist()
    found: list[Any] = []
    for value in column:
        try:
            found.append(value.as_py())
        except UnicodeDecodeError:
            found.append(None)
    return found


def _json_rows(file: Path, columns: Sequence[str], counts: TextCounts) -> Iterator[tuple[Any, Any, str]]:
    for number, line in _lines(file):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # RecursionError: nested too deep
            row = None
        if isinstance(row, dict):
            yield row.get(columns[0]), row.get(columns[1]), f"line {number}"
        else:
            counts.leave_out(NOT_JSON, f"line {number}")


def _klg_rows(file: Path) -> Iterator[tuple[Any, Any, str]]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f'{file}: KAR\'s layout is one JSON object of id -> {{"prompt", "ans"}}')
    for raw_id, value in content.items():
        text = value
        if isinstance(value, dict):
            text = next((value[name] for name in ANSWERS if name in value), None)
        yield raw_id, text, f"id {raw_id[:40]!r}"


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1."""
    with open(file, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line


def _identity_of(target: Place) -> str:
    """The identity that a file was made from; empty if there is no file."""
    try:
        with opened(target) as source:
            return (pa.ipc.open_file(source).schema.metadata or {}).get(_IDENTITY, b"").decode()
    except (OSError, pa.ArrowException):
        return ""
