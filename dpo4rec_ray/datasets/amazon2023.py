"""Amazon reviews of 2023 (Hou et al., arXiv 2403.03952): `Books.jsonl.gz` (reviews) or `Books.csv.gz` (ratings only, with
the header user_id,parent_asin,rating,timestamp), beside `meta_Books.jsonl.gz` if it is there. Also unpacked.

An item is a `parent_asin`: the versions of a product count as one. Times are milliseconds in the files. The metadata give
title, author or store, and the category path. `average_rating` and `rating_number` are never used: they are from 2023, so
they would show every list its own future.
"""

from __future__ import annotations

import re
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.datasets.amazon2018 import RATINGS, find_files, item_table, labelled
from dpo4rec_ray.datasets.files import read_header, without_query
from dpo4rec_ray.datasets.parsing import parse_events, parse_items, why_fields
from dpo4rec_ray.datasets.readers import one_array, read_csv, read_json, why_json
from dpo4rec_ray.datasets.source import EVENTS, DataFile, Parsed, Source
from dpo4rec_ray.errors import UserError

# In the files where a reviewer gave no rating.
NO_RATING = 0.0

_EVENTS = re.compile(r"(?!meta_)(?P<category>.+)\.(jsonl|csv)(\.gz)?")
_WANTED = "<Category>.jsonl.gz or <Category>.csv.gz"
_META_ENDINGS = (".jsonl.gz", ".jsonl")
_TEXT, _REAL, _WHOLE = pa.string(), pa.float64(), pa.int64()
_REVIEW = pa.schema({"user_id": _TEXT, "parent_asin": _TEXT, "rating": _REAL, "timestamp": _WHOLE})
_PRODUCT = pa.schema(
    {
        "parent_asin": _TEXT,
        "title": _TEXT,
        "author": pa.struct({"name": _TEXT}),
        "store": _TEXT,
        "categories": pa.list_(_TEXT),
    }
)
# The store of a book.
_BY_AUTHOR = r"^([^(]+?)\s*\(Author\).*$"


def describe(raw_dir: str, file: str = "") -> Source:
    """The source in a folder, or of one file of interactions; `file` names it where a folder holds several.

    Raises:
        UserError: no file of interactions or several, two of metadata, or a ratings file with another header.
    """
    path, _, meta = find_files(raw_dir, file, _EVENTS, _WANTED, _META_ENDINGS)
    is_csv = without_query(path).removesuffix(".gz").endswith(".csv")
    if is_csv and (header := read_header(path)) != ",".join(_REVIEW.names).encode():
        shown = header[:100].decode("utf-8", "backslashreplace")
        raise UserError(
            f"{path}: the header is {shown!r}, not {','.join(_REVIEW.names)!r}; take a rating_only file"
        )
    events = DataFile(path, parse_ratings if is_csv else parse_reviews, header=is_csv, complete=True)
    return Source((events,), tuple(DataFile(name, parse_products, complete=True) for name in meta))


def parse_reviews(block: bytes) -> Parsed:
    """One block of reviews, a JSON object per line."""
    why = partial(
        why_json, texts=("user_id", "parent_asin"), numbers=(("rating", False), ("timestamp", True))
    )

    def fast(lines: bytes) -> pa.Table:
        return _in_seconds(read_json(lines, _REVIEW, why))

    return parse_events(block, fast, why, ratings=RATINGS, unrated=NO_RATING)


def parse_ratings(block: bytes) -> Parsed:
    """One block of the ratings-only file."""
    why = partial(why_fields, separator=b",", num_fields=4, numbers=((2, False), (3, True)))
    columns = dict(zip(_REVIEW.names, _REVIEW.types, strict=True))

    def fast(lines: bytes) -> pa.Table:
        return _in_seconds(read_csv(lines, columns))

    return parse_events(block, fast, why, ratings=RATINGS, unrated=NO_RATING)


def _in_seconds(table: pa.Table) -> pa.Table:
    """Columns of EVENTS. A negative time stays as it is: divided by 1000 it might become 0, which is a valid time."""
    time_ms = table["timestamp"]
    time_s = pc.if_else(pc.less(time_ms, 0), time_ms, pc.divide(time_ms, 1000))
    return table.set_column(3, "timestamp", time_s).rename_columns(EVENTS.names)


def parse_products(block: bytes) -> Parsed:
    """One block of metadata."""
    why = partial(why_json, texts=("parent_asin",))

    def fast(lines: bytes) -> pa.Table:
        table = read_json(lines, _PRODUCT, why)
        authors = pc.struct_field(one_array(table["author"]), "name")
        makers = _makers(authors, one_array(table["store"]))
        return item_table(table["parent_asin"], table["title"], makers, table["categories"])

    return parse_items(block, fast, why)


def _makers(authors: pa.StringArray, stores: pa.StringArray) -> pa.StringArray:
    """The author, given as such or as the store "X (Author)"; else the store as the brand."""
    is_author = pc.match_substring_regex(stores, _BY_AUTHOR)
    named = pc.if_else(is_author, pc.replace_substring_regex(stores, _BY_AUTHOR, r"\1"), None)
    return pc.coalesce(labelled("author", authors), labelled("author", named), labelled("brand", stores))
