"""A team's own interactions, items and users: Parquet, CSV or JSON lines, with the names of their columns.

Not in the paper. The columns are checked in every file before any event is read. After that, a cell that cannot be read
makes its row a bad row and does not stop the run. Ids become text and times become seconds since 1970 (UTC). `logged.py`
uses the same readers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from dpo4rec_ray.config.data import TableSection
from dpo4rec_ray.datasets import parsing
from dpo4rec_ray.datasets.cells import Column
from dpo4rec_ray.datasets.column_mapping import data_files
from dpo4rec_ray.datasets.parsing import Origin
from dpo4rec_ray.datasets.source import USERS, Parsed, Source
from dpo4rec_ray.errors import UserError

# What ends the names of columns with several values in a cell, separated by blanks, in RecBole's files.
SEQUENCE = ":token_seq"


def describe(
    raw_dir: str, section: TableSection, *, typed: bool = False, parts: tuple[str, ...] = ()
) -> Source:
    """The source in `raw_dir`, a local folder or URI. Reads headers, Parquet schemas and first lines only.

    typed: names of columns are RecBole's "name:type". parts: files of the interactions in the order in which they are to be
    read, in place of `section.interactions`.

    Raises:
        UserError: keys that contradict each other, or as `data_files`.
    """
    s = section
    if s.min_rating > s.max_rating:
        raise UserError(
            f"table.min_rating = {s.min_rating:g} is above table.max_rating = {s.max_rating:g}; swap them"
        )
    if s.attributes and not s.items:
        raise UserError(
            "table.attributes is set and table.items is not; set table.items to the file of the items"
        )
    if s.profile and not s.users:
        raise UserError(
            "table.profile is set and table.users is not; set table.users to the file of the users"
        )

    def separator(name: str) -> str:
        if not typed:
            return s.attribute_separator
        return " " if name.endswith(SEQUENCE) else ""

    event_columns = (
        Column("table.user", s.user, "id", "user"),
        Column("table.item", s.item, "ids" if s.item_separator else "id", "item", separator=s.item_separator),
        Column(
            "table.rating",
            s.rating,
            "number",
            "rating",
            optional=True,
            decimal=s.decimal,
            least=s.min_rating,
            most=s.max_rating,
        ),
        Column("table.timestamp", s.timestamp, "time", "timestamp_s", unit=s.timestamp_unit, optional=True),
    )
    item_columns = (
        Column("table.item_id", s.item_id, "id", "raw_id"),
        Column("table.title", s.title, "text", "title", optional=True),
        *(
            Column(f"table.attributes.{facet}", name, "values", f"facet {facet}", separator=separator(name))
            for facet, name in s.attributes.items()
        ),
    )
    user_columns = (
        Column("table.user_id", s.user_id, "id", "raw_id"),
        *(Column("table.profile", name, "text", f"profile {name}") for name in s.profile),
    )
    finish_events = partial(_finish_events, implicit=not s.rating)
    finish_items = partial(_finish_items, facets=tuple(s.attributes))
    labels = {name: name.partition(":")[0] if typed else name for name in s.profile}
    finish_users = partial(_finish_users, profile=labels)
    return Source(
        events=data_files(
            raw_dir,
            parts or s.interactions,
            "table.interactions",
            event_columns,
            finish_events,
            s,
            s.interaction_columns,
        ),
        items=data_files(raw_dir, s.items, "table.items", item_columns, finish_items, s, s.item_columns)
        if s.items
        else (),
        users=data_files(raw_dir, s.users, "table.users", user_columns, finish_users, s, s.user_columns)
        if s.users
        else (),
    )


def _finish_events(table: pa.Table, origin: Origin, *, implicit: bool) -> Parsed:
    num_lines = origin.rows_read
    if pt.is_list(table.schema.field("item").type):
        table, origin = _one_event_each(table, origin)
    if implicit:
        table = table.append_column("rating", pa.array(np.ones(table.num_rows)))
    if "timestamp_s" not in table.column_names:
        table = table.append_column("timestamp_s", pa.array(np.zeros(table.num_rows, np.int64)))
    parsed = parsing.checked_events(table, origin, ratings=(-np.inf, np.inf))  # the column has its own range
    return replace(parsed, num_lines=num_lines)


def _one_event_each(table: pa.Table, origin: Origin) -> tuple[pa.Table, Origin]:
    """A row for each item of a cell. A cell without items is no damage, and no event."""
    items = table["item"].combine_chunks()
    row = pc.list_parent_indices(items)
    others = table.drop_columns("item").take(row)
    rows_read = origin.rows_read - len(items) + len(row)
    events = others.append_column("item", items.flatten())
    return events, origin._replace(rows=origin.rows[row.to_numpy()], rows_read=rows_read)


def _finish_items(table: pa.Table, origin: Origin, *, facets: tuple[str, ...]) -> Parsed:
    size = table.num_rows
    title = table["title"] if "title" in table.column_names else pa.nulls(size, pa.string())
    values, parents = [pa.array([], pa.string())], [np.zeros(0, dtype=np.int64)]
    for facet in facets if size else ():
        lists = table[f"facet {facet}"].combine_chunks()
        found = pc.utf8_trim_whitespace(lists.flatten())
        kept = pc.fill_null(pc.greater(pc.binary_length(found), 0), False)
        values.append(pc.binary_join_element_wise(f"{facet}: ", found.filter(kept), ""))
        parents.append(pc.list_parent_indices(lists).filter(kept).to_numpy())
    all_values, of_item = pa.concat_arrays(values), np.concatenate(parents)
    codes = all_values.dictionary_encode().indices.to_numpy()
    _, first = np.unique(of_item * len(codes) + codes, return_index=True)  # a value counts once per item
    first.sort()
    order = first[
        np.argsort(of_item[first], kind="stable")
    ]  # by item, then by facet, then in the order of the cell
    offsets = np.concatenate([[0], np.cumsum(np.bincount(of_item[first], minlength=size))]).astype(np.int32)
    attributes = pa.ListArray.from_arrays(pa.array(offsets), all_values.take(pa.array(order)))
    columns = {"raw_id": table["raw_id"], "title": pc.utf8_trim_whitespace(title), "attributes": attributes}
    return parsing.checked_items(pa.table(columns), origin)


def _finish_users(table: pa.Table, origin: Origin, *, profile: dict[str, str]) -> Parsed:
    known = pc.fill_null(pc.greater(pc.binary_length(table["raw_id"]), 0), False)
    origin.quarantine(np.flatnonzero(~known.to_numpy()), parsing.missing_field("user"))
    table = table.filter(known)
    texts = pa.array([""] * table.num_rows, pa.string())
    for name, label in profile.items():
        text = pc.fill_null(pc.utf8_trim_whitespace(table[f"profile {name}"].combine_chunks()), "")
        part = pc.binary_join_element_wise(f", {label}: ", text, "")
        texts = pc.binary_join_element_wise(texts, pc.if_else(pc.equal(text, ""), "", part), "")
    texts, num_cleaned = parsing.clean_strings(pc.utf8_slice_codeunits(texts, len(", ")))
    return Parsed(
        pa.table({"raw_id": table["raw_id"], "profile": texts}).cast(USERS),
        origin.rows_read,
        origin.bad_rows,
        cleaned=Counter({"profiles": num_cleaned} if num_cleaned else {}),
        row_of=origin.rows[known.to_numpy()],
    )
