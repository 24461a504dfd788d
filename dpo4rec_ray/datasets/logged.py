"""Logged candidate lists: impressions of a first-stage ranker with labels, from Parquet, JSON lines or CSV.

Beyond the paper, which draws its lists. One row is one list. A row that cannot be used is quarantined with its reason.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo4rec_ray.config.data import MAX_CANDIDATES, MIN_CANDIDATES, LoggedSection
from dpo4rec_ray.core.candidates import SPLITS
from dpo4rec_ray.datasets import parsing
from dpo4rec_ray.datasets.cells import Column, any_of, numbers_of
from dpo4rec_ray.datasets.column_mapping import data_files
from dpo4rec_ray.datasets.parsing import Origin
from dpo4rec_ray.datasets.source import LISTS, DataFile, Parsed
from dpo4rec_ray.errors import UserError

LENGTHS_DIFFER = "candidates and labels differ in number"
WRONG_SIZE = f"not {MIN_CANDIDATES} to {MAX_CANDIDATES} candidates"
REPEATED = "a candidate twice (kept)"
BAD_LABEL = "a label is null, negative or not finite"
UNKNOWN_SPLIT = f"split is not one of {', '.join(SPLITS)}"
BAD_HISTORY = "history and its ratings differ in number or have gaps"


def describe(path_or_uri: str, section: LoggedSection) -> tuple[DataFile, ...]:
    """The files of the logged lists, whose parsers give LISTS. path_or_uri: as `logged.file`, absolute.

    Raises:
        UserError: ratings without a history, or as `data_files`.
    """
    s = section
    if not s.labels and not s.label_separator:
        raise UserError(
            "logged.labels is not set; name the column of the labels, or set logged.label_separator"
        )
    if s.history_ratings and not s.history:
        raise UserError(
            f"logged.history_ratings = {s.history_ratings!r} and logged.history is not set; name the column of the items"
        )
    listed = partial(Column, separator=s.separator, decimal=s.decimal)
    columns = (
        Column("logged.user", s.user, "id", "user"),
        listed("logged.candidates", s.candidates, "ids", "candidates"),
        listed("logged.labels", "" if s.label_separator else s.labels, "numbers", "labels", optional=True),
        Column("logged.timestamp", s.timestamp, "time", "timestamp_s", unit=s.timestamp_unit, optional=True),
        Column("logged.split", s.split, "text", "split", optional=True),
        listed("logged.history", s.history, "ids", "history", optional=True),
        listed("logged.history_ratings", s.history_ratings, "numbers", "history_ratings", optional=True),
    )
    folder, slash, pattern = path_or_uri.rpartition("/")
    finish = partial(_finish_lists, label_separator=s.label_separator)
    return data_files(folder + slash, pattern, "logged.file", columns, finish, s, s.columns)


def _finish_lists(table: pa.Table, origin: Origin, *, label_separator: str) -> Parsed:
    """Leave out the rows that are no list to rank."""
    given = {name: table[name].combine_chunks() for name in table.column_names}
    if label_separator:
        given |= _with_labels(given["candidates"], label_separator)
    columns = {field.name: given.get(field.name, pa.nulls(len(table), field.type)) for field in LISTS}
    for name in ("labels", "history_ratings"):
        # Before the checks: a number that is too large becomes infinite.
        columns[name] = columns[name].cast(pa.list_(pa.float32()))
    good = np.ones(len(table), dtype=np.bool_)
    for reason, bad in _faults(columns, given):
        origin.quarantine(np.flatnonzero(bad & good), reason)
        good &= ~bad
    # Negatives drawn at random may repeat a candidate (685 of KAR's own 103,697 lists do): such lists are counted and kept.
    repeated = int(np.sum(_repeated(columns["candidates"]) & good))
    kept = pa.table(columns).filter(pa.array(good)).cast(LISTS)
    cleaned = Counter({REPEATED: repeated} if repeated else {})
    return Parsed(kept, origin.rows_read, origin.bad_rows, cleaned=cleaned, row_of=origin.rows[good])


def _with_labels(marked: pa.ListArray, separator: str) -> dict[str, pa.ListArray]:
    """Candidates and labels of "candidate-label"; a label that is not there or no number is null."""
    values = marked.flatten()
    found = pc.extract_regex(values, rf"(?s)^(?P<id>.+){re.escape(separator)}(?P<label>.*)$")
    ids = pc.if_else(found.is_valid(), pc.struct_field(found, "id"), values)
    lengths = pc.fill_null(pc.list_value_length(marked), 0).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return {
        name: pa.ListArray.from_arrays(offsets, parts, mask=marked.is_null())
        for name, parts in (("candidates", ids), ("labels", numbers_of(pc.struct_field(found, "label"))))
    }


def _faults(columns: dict[str, pa.Array], given: dict[str, pa.Array]) -> list[tuple[str, NDArray[np.bool_]]]:
    """(reason, [rows] which have it); of several reasons the first one counts."""
    candidates, labels = columns["candidates"], columns["labels"]
    history, ratings = columns["history"], columns["history_ratings"]
    lengths = _lengths(candidates)
    missing = {"user": _empty(columns["user"])}
    for name in ("candidates", "labels", "timestamp_s", "split"):
        if name in given:
            missing[name] = _mask(columns[name].is_null())
    missing["candidates"] |= any_of(candidates, _empty(candidates.flatten()))
    time = pc.fill_null(columns["timestamp_s"], 0).to_numpy()
    unknown_split = ~_mask(pc.is_in(columns["split"], value_set=pa.array([*SPLITS, None], pa.string())))
    bad_history = any_of(history, _empty(history.flatten())) | any_of(ratings, ~_usable(ratings))
    if "history_ratings" in given:
        bad_history |= _lengths(history) != _lengths(ratings)
    return [
        *((parsing.missing_field(name), absent) for name, absent in missing.items()),
        (LENGTHS_DIFFER, lengths != _lengths(labels)),
        (WRONG_SIZE, (lengths < MIN_CANDIDATES) | (lengths > MAX_CANDIDATES)),
        (BAD_LABEL, any_of(labels, ~_usable(labels, most=1.0))),
        (UNKNOWN_SPLIT, unknown_split),
        (parsing.BAD_TIME, (time < 0) | (time >= parsing.MAX_TIMESTAMP_S)),
        (BAD_HISTORY, bad_history),
    ]


def _lengths(lists: pa.ListArray) -> NDArray[np.int32]:
    """[rows] values per list, -1 where there is no list."""
    return pc.fill_null(pc.list_value_length(lists), -1).to_numpy()


def _mask(array: pa.BooleanArray) -> NDArray[np.bool_]:
    return array.to_numpy(zero_copy_only=False)


def _empty(texts: pa.StringArray) -> NDArray[np.bool_]:
    """Null or ""."""
    return pc.fill_null(pc.binary_length(texts), 0).to_numpy() == 0


def _usable(lists: pa.ListArray, most: float = np.finfo(np.float32).max) -> NDArray[np.bool_]:
    """[values] neither null nor negative nor above `most`. (The losses and NDCG's gain want labels up to 1.)"""
    values = pc.fill_null(lists.flatten(), np.nan).to_numpy()
    return (values >= 0) & (values <= most)


def _repeated(lists: pa.ListArray) -> NDArray[np.bool_]:
    """[rows] whether a list holds a value twice."""
    codes = pc.fill_null(lists.flatten().dictionary_encode().indices, -1).to_numpy().astype(np.int64) + 1
    width = int(codes.max(initial=0)) + 1
    keys = np.sort(pc.list_parent_indices(lists).to_numpy() * width + codes)
    rows = keys[1:][keys[1:] == keys[:-1]] // width
    return np.bincount(rows, minlength=len(lists)) > 0
