"""Synthetic files in the layout of the Amazon reviews of 2018: python -m benchmarks.amazon_files --like amazon-books DEST.

For benchmarks: the real files have 12 GB and may not be shipped. The numbers of users, items and reviews and the lengths
of the tails follow published written. Who reviews what is random, so nothing can be learned from these reviews. Texts come
from small pools: about 360 bytes a line where the real file has about twice that, compressed to 46 where the real one
takes 230.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.amazon_lines import EVENTS_STREAM, Ints, ReviewFormat, meta_chunk, review_chunk
from dpo4rec_ray.errors import UserError

# Lines made and compressed at once: about 70 MB. Another number makes other files of the same seed.
CHUNK_ROWS = 200_000


@dataclass(frozen=True)
class Tail:
    """Reviews per user or item: P(X >= k) ~ (k / least)^-a up to `most`; a follows from the mean.

    Attributes:
        share: in a small file, where it is less than `most`, the longest is this share of the other side, so that
            a user seldom meets an item twice, but at least four times the mean.
    """

    least: int
    most: int
    share: float


@dataclass(frozen=True)
class Shape:
    """Published size of a dataset, the tails that fit it, and the stem of its review file.

    Attributes:
        distinct: no user reviews an item twice.
        min_reviews: below it the tails cannot be kept.
    """

    num_reviews: int
    num_users: int
    num_items: int
    users: Tail
    items: Tail
    stem: str
    distinct: bool = False
    min_reviews: int = 1_000


SHAPES = {
    # Books of 2018. The longest are chosen so that the tails agree with what is published: 1.87 M users and 0.76 M items
    # have 5 reviews or more, 303 k users have 20 (301,567 were counted), and the 5-core of what is written holds 27.3 M
    # reviews, 1.68 M users and 0.52 M items (27,164,983, 1,856,344 and 704,093). Its 60/40-core: 4.7 M, 35 k, 28 k.
    "amazon-books": Shape(
        51_311_621, 15_362_619, 2_930_451, Tail(1, 1_000, 0.02), Tail(1, 10_000, 0.01), "Books"
    ),
    # The size that the paper's 60/40-core has; here it is all of the file.
    "amazon-books-core": Shape(
        1_406_582, 11_906, 17_332, Tail(60, 2_000, 0.1), Tail(40, 2_000, 0.1), "Books_5", True, 100_000
    ),
}
META_NAME = "meta_Books.json.gz"


@dataclass(frozen=True)
class Written:
    """What was written. num_meta: items that have a line in the catalogue; num_bytes: of all files."""

    reviews: Path
    num_reviews: int
    num_users: int
    num_items: int
    num_meta: int
    num_bytes: int
    seconds: float


def write_amazon_like(
    folder: str | Path,
    *,
    like: str = "amazon-books",
    num_reviews: int | None = None,
    seed: int = 0,
    layout: ReviewFormat = "json.gz",
    meta: bool = True,
    processes: int = 1,
) -> Written:
    """Write reviews, and the catalogue if `meta`, into `folder`; files of the same names are replaced.

    Args:
        num_reviews: None is as many as the real dataset has; users and items keep their proportion to it.
        layout: "json.gz" is the review file, "csv" the file of ratings only (item, user, stars, time).
        processes: how many make lines; the files do not depend on it.

    Raises:
        UserError: an unknown shape, or too few reviews for it.
    """
    started = time.monotonic()
    if like not in SHAPES:
        raise UserError(f"like = {like!r}: no such shape; known: {', '.join(SHAPES)}")
    shape = SHAPES[like]
    wanted = shape.num_reviews if num_reviews is None else num_reviews
    if wanted < shape.min_reviews:
        raise UserError(
            f"like = {like!r}: {wanted} reviews; its tails need at least {shape.min_reviews}: ask for more"
        )
    num_users, num_items = (round(wanted * n / shape.num_reviews) for n in (shape.num_users, shape.num_items))
    rng = np.random.default_rng([seed, EVENTS_STREAM])
    users, item_ends = draw_events(shape, wanted, num_users, num_items, rng)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    reviews = folder / review_name(shape, layout)

    def items_of(low: int, high: int) -> Ints:
        return np.searchsorted(item_ends, np.arange(low, high), side="right")

    tasks = (
        (seed, number, items_of(low, high), users[low:high], layout)
        for number, (low, high) in enumerate(_chunks(wanted))
    )
    num_bytes, _ = _write(reviews, review_chunk, tasks, processes)
    num_meta = 0
    if meta:
        tasks = ((seed, number, low, high) for number, (low, high) in enumerate(_chunks(num_items)))
        meta_bytes, num_meta = _write(folder / META_NAME, meta_chunk, tasks, processes)
        num_bytes += meta_bytes
    seconds = time.monotonic() - started
    return Written(reviews, wanted, num_users, num_items, num_meta, num_bytes, seconds)


def review_name(shape: Shape, layout: ReviewFormat) -> str:
    return "Books.csv" if layout == "csv" else f"{shape.stem}.json.gz"


def draw_events(
    shape: Shape, num_reviews: int, num_users: int, num_items: int, rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Who reviews what: the user of every row, [num_reviews], and the row after each item's last, [num_items].

    Every user and item keeps the number of reviews that its tail gives; which user meets which item is random.
    """
    user_degrees = _degrees(shape.users, num_reviews, num_users, num_items)
    item_degrees = _degrees(shape.items, num_reviews, num_items, num_users)
    rng.shuffle(item_degrees)
    users = np.repeat(np.arange(num_users, dtype=np.int32), user_degrees)
    rng.shuffle(users)
    if shape.distinct:
        _part_repeats(users, np.repeat(np.arange(num_items), item_degrees), rng)
    return users, np.cumsum(item_degrees)


def _degrees(tail: Tail, total: int, number: int, num_others: int) -> NDArray[np.int64]:
    """`number` degrees that add up to `total`: the quantiles of the tail, longest first."""
    mean = total / number
    most = min(tail.most, max(int(4 * mean), int(tail.share * num_others)))
    ratios = np.arange(tail.least, most + 1) / tail.least
    low, high = 0.01, 10.0
    for _ in range(60):  # the mean falls as the exponent grows
        exponent = (low + high) / 2
        beyond = ((most + 1) / tail.least) ** -exponent
        too_long = tail.least - 1 + ((ratios**-exponent - beyond) / (1 - beyond)).sum() > mean
        low, high = (exponent, high) if too_long else (low, exponent)
    chance = (np.arange(number) + 0.5) / number
    degrees = np.floor(tail.least * (chance * (1 - beyond) + beyond) ** (-1 / exponent)).astype(np.int64)
    degrees = degrees.clip(tail.least, most)
    while gap := total - int(degrees.sum()):
        movable = np.flatnonzero(degrees < most if gap > 0 else degrees > tail.least)
        places = np.linspace(0, len(movable) - 1, min(abs(gap), len(movable))).astype(np.int64)
        degrees[movable[places]] += np.sign(gap)
    return degrees


def _part_repeats(users: NDArray[np.int32], items: Ints, rng: np.random.Generator) -> None:
    """Let users who meet an item twice change places with others, in place, until none does."""
    while True:
        keys = items * (int(users.max()) + 1) + users
        order = np.argsort(keys, kind="stable")
        again = order[1:][np.diff(keys[order]) == 0]
        if not len(again):
            return
        rows = np.union1d(again, rng.integers(len(users), size=2 * len(again)))
        users[rows] = rng.permutation(users[rows])


def _chunks(total: int) -> Iterator[tuple[int, int]]:
    return ((low, min(low + CHUNK_ROWS, total)) for low in range(0, total, CHUNK_ROWS))


def _write(
    path: Path, work: Callable[[Any], tuple[bytes, int]], tasks: Iterable[tuple[Any, ...]], processes: int
) -> tuple[int, int]:
    """Bytes and rows written: the pieces of all tasks in order. The file gets its name when it is complete."""
    num_bytes = num_rows = 0
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as sink:
            for content, rows in _worked(work, tasks, processes):
                num_bytes += sink.write(content)
                num_rows += rows
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return num_bytes, num_rows


def _worked(work: Callable[[Any], Any], tasks: Iterable[Any], processes: int) -> Iterator[Any]:
    if processes <= 1:
        yield from map(work, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(work, tasks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files and print one line. Exit code: 0, or 2 with one line for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.amazon_files", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", metavar="DEST", help="folder to write to")
    parser.add_argument("--like", choices=list(SHAPES), required=True, help="the dataset whose shape it has")
    parser.add_argument(
        "--reviews", type=int, metavar="N", help="number of reviews (default: the real one's)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--layout", choices=["json.gz", "csv"], default="json.gz", help="reviews, or ratings only"
    )
    parser.add_argument("--no-meta", action="store_true", help="write no catalogue")
    parser.add_argument("--processes", type=int, default=1, metavar="P")
    parser.add_argument("--force", action="store_true", help="replace such files that are there already")
    try:
        _run(parser.parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    """Write what the options ask for and print one line.

    Raises:
        UserError: the folder holds such files already and --force is not given, or it cannot be written.
    """
    folder = Path(options.folder)
    names = {review_name(shape, layout) for shape in SHAPES.values() for layout in ("json.gz", "csv")} | {
        META_NAME
    }
    there = [folder / name for name in sorted(names) if (folder / name).exists()]
    if there and not options.force:
        raise UserError(f"{there[0]} exists already: choose another folder, or replace it with --force")
    try:
        for path in there:  # a file of the other layout would be read in place of the new one
            path.unlink()
        written = write_amazon_like(
            folder,
            like=options.like,
            num_reviews=options.reviews,
            seed=options.seed,
            layout=options.layout,
            meta=not options.no_meta,
            processes=options.processes,
        )
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
    print(
        f"{written.reviews}: {written.num_reviews:,} reviews of {written.num_items:,} items by "
        f"{written.num_users:,} users, {written.num_meta:,} items described, {written.num_bytes / 1e9:.2f} GB, "
        f"{written.seconds:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
