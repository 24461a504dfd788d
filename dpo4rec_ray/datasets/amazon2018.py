"""Amazon reviews of 2018 (Ni et al., EMNLP 2019): `Books_5.json.gz` (the 5-core), `Books.json.gz` (all reviews) or
`Books.csv` (ratings only: item,user,rating,timestamp without a header), beside `meta_Books.json.gz` if it is there.

Each file may be compressed or not. The metadata give title, author or brand, and the category path. Price, sales rank and
what was bought together are not used: they are from the day of the crawl, after every review. The release of 2023 uses
this module's functions to find files and to name attributes.
"""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.datasets.files import join, list_files, without_query
from dpo4rec_ray.datasets.parsing import clean_strings, parse_events, parse_items, why_fields
from dpo4rec_ray.datasets.readers import one_array, read_csv, read_json, why_json
from dpo4rec_ray.datasets.source import EVENTS, DataFile, Parsed, Source
from dpo4rec_ray.errors import UserError

RATINGS = (1.0, 5.0)
# Categories kept per item.
MAX_CATEGORIES = 4
# Characters of a name; longer ones are texts about the product.
MAX_NAME = 60
# Categories whose `brand` is the author.
AUTHORED = ("Books", "Kindle_Store")

# `ratings_Books.csv` belongs to the release of 2014, whose first two columns are swapped.
_EVENTS = re.compile(r"(?!meta_|ratings_)(?P<category>.+?)(_5)?\.(json|csv)(\.gz)?")
_WANTED = "<Category>_5.json.gz, <Category>.json.gz or <Category>.csv"
_META_ENDINGS = (".json.gz", ".json")
_TEXT, _REAL, _WHOLE = pa.string(), pa.float64(), pa.int64()
_REVIEW = pa.schema({"reviewerID": _TEXT, "asin": _TEXT, "overall": _REAL, "unixReviewTime": _WHOLE})
_PRODUCT = pa.schema({"asin": _TEXT, "title": _TEXT, "brand": _TEXT, "category": pa.list_(_TEXT)})
_CSV = {"item": _TEXT, "user": _TEXT, "rating": _REAL, "timestamp_s": _WHOLE}
_NO_NAME = ("", "-", "by", "unknown", "n/a", "none", "null", "generic", "unbranded", "not available")


def describe(raw_dir: str, file: str = "") -> Source:
    """The source in a folder, or of one file of interactions; `file` names it where a folder holds several.

    Raises:
        UserError: no file of interactions or several, or two of metadata.
    """
    path, category, meta = find_files(raw_dir, file, _EVENTS, _WANTED, _META_ENDINGS)
    is_csv = without_query(path).removesuffix(".gz").endswith(".csv")
    events = DataFile(path, parse_ratings if is_csv else parse_reviews, complete=True)
    parse = partial(parse_products, maker="author" if category in AUTHORED else "brand")
    return Source((events,), tuple(DataFile(name, parse, complete=True) for name in meta))


def parse_reviews(block: bytes) -> Parsed:
    """One block of reviews, a JSON object per line."""
    why = partial(
        why_json, texts=("reviewerID", "asin"), numbers=(("overall", False), ("unixReviewTime", True))
    )

    def fast(lines: bytes) -> pa.Table:
        return read_json(lines, _REVIEW, why).rename_columns(EVENTS.names)

    return parse_events(block, fast, why, ratings=RATINGS)


def parse_ratings(block: bytes) -> Parsed:
    """One block of the ratings-only file."""
    why = partial(why_fields, separator=b",", num_fields=4, numbers=((2, False), (3, True)))
    return parse_events(block, partial(read_csv, columns=_CSV), why, ratings=RATINGS)


def parse_products(block: bytes, maker: str) -> Parsed:
    """One block of metadata; `maker` is what `brand` is called: author or brand."""
    why = partial(why_json, texts=("asin",))

    def fast(lines: bytes) -> pa.Table:
        table = read_json(lines, _PRODUCT, why)
        return item_table(table["asin"], table["title"], labelled(maker, table["brand"]), table["category"])

    return parse_items(block, fast, why)


def find_files(
    raw_dir: str, file: str, events: re.Pattern[str], wanted: str, meta_endings: tuple[str, ...]
) -> tuple[str, str, list[str]]:
    """Path of the interactions, their category, and path of its metadata if there is any.

    Args:
        events: pattern of the names of interactions, with a group "category"; `wanted` says the same in words.
        meta_endings: suffixes of "meta_<category>".

    Raises:
        UserError: as for `describe`.
    """
    listed = list_files(raw_dir)
    found = [item for item in listed if events.fullmatch(item.name)]
    chosen = [item for item in found if item.name == file] if file else found
    if len(chosen) != 1:
        names = ", ".join(item.name for item in chosen or listed) or "nothing"
        if file:
            what = f"data.file = {file!r} is no file of interactions ({wanted}) there"
        elif chosen:
            what = "several files of interactions; set data.file to the name of one"
        else:
            what = f"no file of interactions ({wanted})"
        raise UserError(f"{raw_dir}: {what}; found: {names}")
    name, path = chosen[0].name, chosen[0].path
    category = events.fullmatch(name)["category"]
    names = [f"meta_{category}{ending}" for ending in meta_endings]
    if path == raw_dir:  # some servers give files but list nothing: ask for each
        plain = without_query(path)
        beside = plain.removesuffix(name) + path.removeprefix(plain)
        metas = [meta for meta in (join(beside, meta) for meta in names) if _is_there(meta)]
    else:
        metas = [item.path for item in listed if item.name in names]
    if len(metas) > 1:
        raise UserError(f"{raw_dir}: metadata of {category} twice: {', '.join(metas)}; move one elsewhere")
    return path, category, metas


def _is_there(path: str) -> bool:
    try:
        return bool(list_files(path))
    except UserError:
        return False


def item_table(
    ids: pa.ChunkedArray, titles: pa.ChunkedArray, makers: pa.StringArray, categories: pa.ChunkedArray
) -> pa.Table:
    """Columns of ITEMS; attributes are the maker ("author: X"; null: none), then the category path below its root."""
    paths = one_array(categories)
    lengths = pc.fill_null(pc.list_value_length(paths), 0).to_numpy()
    row = np.repeat(np.arange(len(lengths)), lengths)
    level = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
    names = labelled("category", paths.flatten())
    # A name that ends with "." is a sentence about the product.
    names = pc.if_else(pc.ends_with(names, "."), None, names)
    usable = (level > 0) & names.is_valid().to_numpy(zero_copy_only=False)
    row, names = row[usable], names.filter(pa.array(usable))
    codes = names.dictionary_encode()
    _, first = np.unique(row * (len(codes.dictionary) + 1) + codes.indices.to_numpy(), return_index=True)
    first.sort()
    row = row[first]
    few = np.arange(len(row)) - np.searchsorted(row, row) < MAX_CATEGORIES
    row, names = row[few], names.take(pa.array(first[few]))

    made = makers.is_valid().to_numpy(zero_copy_only=False)
    rows = np.concatenate([np.flatnonzero(made), row])
    values = pa.concat_arrays([makers.drop_null(), names]).take(pa.array(np.argsort(rows, kind="stable")))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(makers)))])
    attributes = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
    return pa.table({"raw_id": ids, "title": pc.utf8_trim_whitespace(titles), "attributes": attributes})


def labelled(facet: str, names: pa.ChunkedArray | pa.StringArray) -> pa.StringArray:
    """ "facet: name" without markup and without "Visit Amazon's ... Page"; null where there is no name."""
    names, _ = clean_strings(one_array(names))
    names = pc.utf8_trim_whitespace(names)
    names = pc.replace_substring_regex(names, r"^Visit Amazon['’]s (.+) Page$", r"\1")
    names = pc.replace_substring_regex(names, r"^by\s+", "")
    none = pc.is_in(pc.utf8_lower(names), pa.array(_NO_NAME))
    none = pc.or_(none, pc.greater(pc.utf8_length(names), MAX_NAME))
    return pc.binary_join_element_wise(facet, pc.if_else(none, None, names), ": ")
