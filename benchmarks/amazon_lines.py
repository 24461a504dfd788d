"""The lines of synthetic Amazon files (amazon_files.py): ids, reviews and metadata as in the release of 2018, compressed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

ReviewFormat = Literal["json.gz", "csv"]
Ints = NDArray[np.integer[Any]]

# Share of the items that have a line in the catalogue (an assumption).
META_SHARE = 0.97
# Shares of 1 to 5 stars (an assumption: no table is published for the release).
STAR_SHARES = (0.04, 0.04, 0.09, 0.20, 0.63)
FIRST_DAY, LAST_DAY = np.datetime64("1996-05-20"), np.datetime64("2018-10-02")
# Exponent of the uniform draw of a time: half of the reviews are from 2015 on (an assumption).
RECENT = 0.25
EVENTS_STREAM, REVIEWS_STREAM, META_STREAM = 1, 2, 3


def reviewer_ids(index: Ints) -> pa.StringArray:
    """One id per index, "A" and 13 of A-Z and 0-9; distinct because every step can be undone (splitmix64)."""
    rest = index.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        rest = (rest ^ (rest >> np.uint64(shift))) * np.uint64(factor)
    rest ^= rest >> np.uint64(31)
    letters = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", dtype=np.uint8)
    text = np.full((len(index), 14), ord("A"), dtype=np.uint8)
    for place in range(1, 14):
        text[:, place] = letters[rest % np.uint64(36)]
        rest //= np.uint64(36)
    return _strings(text)


def asins(index: Ints) -> pa.StringArray:
    """One ISBN-10 per index below 10^9, as printed books have; leading zeros and a final X included."""
    number = (index.astype(np.int64) * 387_420_489 + 1_713_353) % 10**9  # 3^18 has no factor of 10
    text = np.empty((len(index), 10), dtype=np.uint8)
    weighted = np.zeros(len(index), dtype=np.int64)
    for place in range(8, -1, -1):
        number, digit = np.divmod(number, 10)
        text[:, place] = ord("0") + digit
        weighted += (10 - place) * digit
    check = -weighted % 11
    text[:, 9] = np.where(check == 10, ord("X"), ord("0") + check)
    return _strings(text)


def _strings(text: NDArray[np.uint8]) -> pa.StringArray:
    """[n, width] bytes -> n strings."""
    offsets = np.arange(len(text) + 1, dtype=np.int32) * np.int32(text.shape[1])
    return pa.StringArray.from_buffers(
        len(text), pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(text))
    )


# Texts of the lines. Each string of the pools below ends with the text between its field and the next one.
_DAYS = np.arange(FIRST_DAY, LAST_DAY + 1)
_SECONDS = _DAYS.astype("datetime64[s]").astype(np.int64)
_NAMES = (
    "Amazon Customer", "Kindle Customer", "john stoiber", "NPR MAN", "José A.", 'K. "Kat" Weller', "mrs g", "J&J",
    "Bookworm", "D. Okafor", "avid reader", "Tanaka Y.", "Robert E. Lindqvist",
)  # fmt: skip
_FORMATS = ("Kindle Edition", "Paperback", "Hardcover", "Mass Market Paperback", "Audible Audiobook")
_OPENINGS = (
    "I could not put this one down and finished it in two evenings", "A gift for my mother, who reads everything",
    "A slow start of a hundred pages, and then the story takes hold", "Not what I expected after the first book",
    "Our book club chose it and everybody had something to say", "I have read this author for twenty years",
    'The reviewer who called it "unreadable" must have had another book', "Bought it for a class on modern history",
    "My kids (5 and 8) ask for it every night", "Arrived on time and in good condition, as described",
    "It’s a page turner from the first line to the last", "Beautiful photographs & instructions that are clear",
)  # fmt: skip
_ENDINGS = (
    "; I would recommend it to anyone who likes a good mystery.", ".\nThe ending left me wanting more, though.",
    " and I am looking forward to the next one in the series.", ". Worth every penny and then some!",
    " -- not for everyone.\n\nI gave it to a friend who loved it.", ", but the middle third drags and could go.",
    ", and the writing is better than most of what is published today.", "... in the end just OK for me.",
    ". Sadly the last pages were missing from my copy, but the seller sent another.", ". I learned a lot from it.",
    "; the translation reads well, which is rare.", ". Four of us have read it by now and all of us agree.",
)  # fmt: skip
_SUMMARIES = (
    "Five Stars", "Four Stars", "Three Stars", "Great read", "Loved it", "A must read for every fan", "Good, not great",
    "Could not put it down", "Best of the series so far", "Slow", '"Wow"', "Beautifully written", "Highly recommended!",
)  # fmt: skip
_FIRST_WORDS = ("Silent", "Golden", "Broken", "Hidden", "Crimson", "Endless", "Hollow", "Distant", "Café")
_LAST_WORDS = ("Harbor", "Garden", "Mirror", "River", "Letter", "Station", "Orchard", "Lantern", "Bridge")
_SUBTITLES = (
    *[""] * 60, *[": A Novel"] * 30, *[f" (Book {number})" for number in range(1, 21)], *[" &amp; Other Stories"] * 8,
    *[": The Author&#39;s Cut"] * 5, *[' <span class="a-size-medium">(Paperback)</span>'] * 4,
    " var aPageStart = (new Date()).getTime();",
)  # fmt: skip
_GENRES = ("Literature &amp; Fiction", "Mystery, Thriller &amp; Suspense", "Children's Books", "History")


def _pool(values: Iterable[str], before: str = "", after: str = "") -> pa.StringArray:
    """`values` as the inside of JSON strings, each between the texts before and after it on the line."""
    return pa.array([before + json.dumps(value)[1:-1] + after for value in values])


_HEAD = '{{"overall": {}.0, "verified": {}, "reviewTime": "'
_HEADS = [_HEAD.format(stars, verified) for stars in range(1, 6) for verified in ("false", "true")]
_DATES = [f"{day.month:02d} {day.day}, {day.year}" for day in _DAYS.tolist()]
_REVIEW_POOLS = {
    "head": pa.array(_HEADS),
    "date": _pool(_DATES, after='", "reviewerID": "'),
    "style": _pool(_FORMATS, '", "style": {"Format:": " ', '"}, "reviewerName": "'),
    "name": _pool(_NAMES, after='", "reviewText": "'),
    "opening": _pool(_OPENINGS),
    "ending": _pool(_ENDINGS, after='", "summary": "'),
    "summary": _pool(_SUMMARIES, after='", "unixReviewTime": '),
    "time": pa.array([f"{second}}}\n" for second in _SECONDS]),
}
_RATING_POOLS = {
    "stars": pa.array([f",{stars}.0," for stars in range(1, 6)]),
    "time": pa.array([f"{second}\n" for second in _SECONDS]),
}
_RANK = (
    '{:,} in Books (", "also_view": [], "details": {{}}, "main_cat": "Books", "similar_item": "", "date": "'
)
_META_POOLS = {
    "category": _pool(_GENRES, '{"category": ["Books", "', '"], "tech1": "", "description": ["'),
    "opening": _pool(_OPENINGS),
    "ending": _pool(_ENDINGS, after='"], "fit": "", "title": "'),
    "first": _pool(_FIRST_WORDS, after=" "),
    "last": _pool(_LAST_WORDS),
    "subtitle": _pool(_SUBTITLES, after='", "also_buy": [], "image": [], "tech2": "", "brand": "'),
    "brand": _pool(_NAMES, after='", "feature": [], "rank": "'),
    "rank": pa.array([_RANK.format(rank) for rank in range(997, 5_000_000, 9973)]),
    "price": pa.array([f'", "price": "${dollars}.99", "asin": "' for dollars in range(1, 40)]),
}


def review_chunk(task: tuple[int, int, Ints, Ints, ReviewFormat]) -> tuple[bytes, int]:
    """Review lines of the rows of one chunk, and how many."""
    seed, number, items, users, layout = task
    rng = np.random.default_rng([seed, REVIEWS_STREAM, number])
    rows = len(items)
    stars = np.searchsorted(np.cumsum(STAR_SHARES[:-1]), rng.random(rows), side="right")
    day = (len(_DAYS) * rng.random(rows) ** RECENT).astype(np.int64)
    distinct, places = np.unique(items, return_inverse=True)
    asin, user = asins(distinct).take(pa.array(places)), reviewer_ids(users)
    if layout == "csv":
        rest = _drawn(_RATING_POOLS, {"stars": stars, "time": day}, rng, rows)
        return bytes(_content(asin, ",", user, *rest)), rows
    verified = rng.random(rows) < 0.7
    given = {"head": 2 * stars + verified, "date": day, "time": day}
    head, date, *rest = _drawn(_REVIEW_POOLS, given, rng, rows)
    return _gzip(_content(head, date, user, '", "asin": "', asin, *rest)), rows


def meta_chunk(task: tuple[int, int, int, int]) -> tuple[bytes, int]:
    """Catalogue lines of items low..high-1, and how many have one."""
    seed, number, low, high = task
    rng = np.random.default_rng([seed, META_STREAM, number])
    index = low + np.flatnonzero(rng.random(high - low) < META_SHARE)
    return _gzip(_content(*_drawn(_META_POOLS, {}, rng, len(index)), asins(index), '"}\n')), len(index)


def _drawn(
    pools: dict[str, pa.StringArray], given: dict[str, Ints], rng: np.random.Generator, rows: int
) -> list[pa.StringArray]:
    """One string per row from every pool: at the given places, or at random where none are given."""
    places = {
        name: given[name] if name in given else rng.integers(len(pool), size=rows)
        for name, pool in pools.items()
    }
    return [pool.take(pa.array(places[name])) for name, pool in pools.items()]


def _content(*parts: pa.StringArray | str) -> memoryview:
    """All rows one after the other, each with its parts joined. Arrow keeps joined strings like this, so nothing is copied."""
    joined = pc.binary_join_element_wise(*parts, "")
    _, offsets, content = joined.buffers()
    end = np.frombuffer(offsets, dtype=np.int32)[len(joined)]
    return memoryview(content or b"")[:end]


def _gzip(content: memoryview) -> bytes:
    """One gzip member. Several members in a row are one gzip file."""
    return zlib.compress(content, 1, wbits=31)
