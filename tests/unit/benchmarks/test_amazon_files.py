"""Files like Amazon's of 2018: the same bytes for a seed, the published marginals, lines as the real file has them."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections import Counter
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks import amazon_files, amazon_lines
from benchmarks.amazon_files import SHAPES, Written, draw_events, main, write_amazon_like
from benchmarks.amazon_lines import asins, reviewer_ids
from dpo4rec_ray.datasets import amazon2018
from dpo4rec_ray.datasets.files import plan_splits, read_blocks
from dpo4rec_ray.errors import UserError

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "amazon-gift-cards"
REVIEW_FIELDS = [
    "overall", "verified", "reviewTime", "reviewerID", "asin", "style", "reviewerName", "reviewText", "summary", "unixReviewTime",
]  # fmt: skip


def _events(like: str, num_reviews: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Users and items of all rows, and how many of each there should be."""
    shape = SHAPES[like]
    num_users = round(num_reviews * shape.num_users / shape.num_reviews)
    num_items = round(num_reviews * shape.num_items / shape.num_reviews)
    users, ends = draw_events(shape, num_reviews, num_users, num_items, np.random.default_rng(3))
    return users, np.repeat(np.arange(num_items), np.diff(ends, prepend=0)), num_users, num_items


def _read(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Written]:
    """200,000 reviews and their catalogue."""
    folder = tmp_path_factory.mktemp("books")
    return folder, write_amazon_like(folder, num_reviews=200_000, seed=5)


@pytest.fixture(scope="module")
def reviews(books: tuple[Path, Written]) -> list[dict]:
    return _read(books[0] / "Books.json.gz")


def test_a_seed_gives_the_same_bytes_whatever_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(amazon_files, "CHUNK_ROWS", 6_000)

    def content(name: str, **options) -> list[bytes]:
        write_amazon_like(tmp_path / name, num_reviews=20_000, **options)
        return [path.read_bytes() for path in sorted((tmp_path / name).iterdir())]

    first = content("first", seed=1)
    assert content("again", seed=1) == first
    assert content("two", seed=1, processes=2) == first
    other = content("other", seed=2)
    assert other[0] != first[0] and other[1] != first[1]
    assert content("csv", seed=1, layout="csv", processes=2) == content("csv1", seed=1, layout="csv")


def test_every_line_has_the_fields_of_the_real_file_in_its_order(reviews: list[dict]):
    assert all(list(review) == REVIEW_FIELDS for review in reviews)
    if REAL.exists():
        real = _read(REAL / "Gift_Cards_5.json.gz")
        assert REVIEW_FIELDS in [list(review) for review in real]
    for review in reviews[:2000]:
        at = datetime.fromtimestamp(review["unixReviewTime"], UTC)
        assert review["unixReviewTime"] % 86400 == 0 and 1996 <= at.year <= 2018
        assert review["reviewTime"] == f"{at.month:02d} {at.day}, {at.year}"
        assert isinstance(review["verified"], bool) and review["style"]["Format:"].startswith(" ")
        assert 50 <= len(review["reviewText"]) <= 160


def test_the_marginals_are_the_published_ones(reviews: list[dict], books: tuple[Path, Written]):
    # 200,000 / 51,311,621 of 15,362,619 users and 2,930,451 items
    users, items = Counter(r["reviewerID"] for r in reviews), Counter(r["asin"] for r in reviews)
    assert (len(reviews), len(users), len(items)) == (200_000, 59_880, 11_422)
    figures = books[1]
    assert (figures.num_reviews, figures.num_users, figures.num_items) == (200_000, 59_880, 11_422)
    assert figures.num_bytes == sum(path.stat().st_size for path in books[0].iterdir())
    for counts, most in ((users, 228), (items, 598)):  # 2 % of the items, 1 % of the users
        assert min(counts.values()) == 1
        assert 0.95 * most < max(counts.values()) <= most
    stars = Counter(r["overall"] for r in reviews)
    for value, share in zip((1.0, 2.0, 3.0, 4.0, 5.0), (0.04, 0.04, 0.09, 0.20, 0.63), strict=True):
        assert stars[value] / 200_000 == pytest.approx(share, abs=0.005)
    assert len({(r["reviewerID"], r["asin"]) for r in reviews}) > 0.97 * 200_000


def test_rows_are_grouped_by_item(reviews: list[dict]):
    changes = sum(a["asin"] != b["asin"] for a, b in pairwise(reviews))
    assert changes == 11_422 - 1


def test_the_tails_at_two_million_are_those_of_the_release():
    """Published for 51.3 M reviews: 1,856,344 users and 704,093 items in the 5-core, 301,567 users with 20 or more."""
    users, items, num_users, num_items = _events("amazon-books", 2_000_000)
    by_user, by_item = np.bincount(users), np.bincount(items)
    assert (len(by_user), len(by_item)) == (num_users, num_items) and by_user.min() == by_item.min() == 1
    assert np.mean(by_user >= 20) == pytest.approx(301_567 / 15_362_619, rel=0.05)
    assert np.mean(by_user >= 5) == pytest.approx(1_856_344 / 15_362_619, rel=0.05)
    assert np.mean(by_item >= 5) == pytest.approx(704_093 / 2_930_451, rel=0.15)


@pytest.mark.parametrize("num_reviews", [100_000, 1_406_582])
def test_the_core_is_a_core_without_repeats(num_reviews: int):
    users, items, num_users, num_items = _events("amazon-books-core", num_reviews)
    by_user, by_item = np.bincount(users), np.bincount(items)
    assert (len(users), len(by_user), len(by_item)) == (num_reviews, num_users, num_items)
    assert by_user.min() >= 60 and by_item.min() >= 40
    assert len(np.unique(users.astype(np.int64) * num_items + items)) == num_reviews


def test_the_core_of_the_paper_has_its_size_and_file_name(tmp_path: Path):
    shape = SHAPES["amazon-books-core"]
    assert (shape.num_reviews, shape.num_users, shape.num_items) == (1_406_582, 11_906, 17_332)
    figures = write_amazon_like(tmp_path, like="amazon-books-core", num_reviews=100_000, meta=False)
    assert [path.name for path in tmp_path.iterdir()] == ["Books_5.json.gz"]
    pairs = [(review["reviewerID"], review["asin"]) for review in _read(figures.reviews)]
    assert len(pairs) == len(set(pairs)) == 100_000
    assert min(Counter(user for user, _ in pairs).values()) >= 60


def test_ids_are_distinct_and_look_like_amazons():
    users = reviewer_ids(np.arange(500_000)).to_pylist()
    assert len(set(users)) == 500_000
    assert all(len(u) == 14 and u[0] == "A" and u.isalnum() and u.upper() == u for u in users)
    items = asins(np.arange(500_000)).to_pylist()
    assert len(set(items)) == 500_000
    for item in items[:1000] + items[-1000:]:
        digits = [10 if letter == "X" else int(letter) for letter in item]
        assert len(digits) == 10 and sum((10 - i) * digit for i, digit in enumerate(digits)) % 11 == 0
    # An id belongs to its index, wherever that stands.
    assert reviewer_ids(np.array([7, 499_999])).to_pylist() == [users[7], users[499_999]]
    assert asins(np.array([499_999])).to_pylist() == [items[499_999]]


def test_the_catalogue_describes_most_items_and_some_titles_are_dirty(books, reviews: list[dict]):
    products = _read(books[0] / "meta_Books.json.gz")
    ids = [product["asin"] for product in products]
    assert len(ids) == len(set(ids)) == books[1].num_meta
    assert set(ids) < {review["asin"] for review in reviews}
    assert books[1].num_meta / books[1].num_items == pytest.approx(0.97, abs=0.01)
    assert all(p["category"][0] == "Books" and p["brand"] and p["title"] for p in products)
    dirty = sum("&" in p["title"] or "<" in p["title"] or "getTime" in p["title"] for p in products)
    assert 0.05 < dirty / len(products) < 0.25
    if REAL.exists():
        assert list(products[0]) == list(_read(REAL / "meta_Gift_Cards.json.gz")[0])


def test_the_ratings_file_has_the_same_events(tmp_path: Path, reviews: list[dict]):
    figures = write_amazon_like(tmp_path, num_reviews=200_000, seed=5, layout="csv", meta=False)
    assert figures.reviews.name == "Books.csv"
    with figures.reviews.open(newline="") as lines:
        rows = list(csv.reader(lines))
    assert rows == [
        [r["asin"], r["reviewerID"], str(r["overall"]), str(r["unixReviewTime"])] for r in reviews
    ]


def test_the_source_of_2018_reads_all_of_it(books: tuple[Path, Written]):
    source = amazon2018.describe(str(books[0]))
    for files, wanted in ((source.events, 200_000), (source.items, books[1].num_meta)):
        parsed = [
            file.parse(block.content)
            for split in plan_splits(files)
            for file in [files[split.file]]
            for block in read_blocks(split, file)
        ]
        assert sum(part.table.num_rows for part in parsed) == wanted
        assert not any(part.quarantined.counts for part in parsed)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"like": "amazon-toys"}, "amazon-books, amazon-books-core"),
        ({"num_reviews": 999}, "999 reviews.*at least 1000"),
        ({"like": "amazon-books-core", "num_reviews": 60_000}, "at least 100000"),
    ],
)
def test_what_cannot_be_made_is_a_user_error(tmp_path: Path, options: dict, what: str):
    with pytest.raises(UserError, match=what):
        write_amazon_like(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_run_that_fails_leaves_no_file(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(amazon_lines, "_gzip", lambda content: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_amazon_like(tmp_path, num_reviews=1000)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = [str(tmp_path / "new"), "--like", "amazon-books", "--reviews", "1000"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "1,000 reviews of 57 items by 299 users" in printed
    assert main([*command, "--layout", "csv"]) == 2
    assert re.search(r"Books\.json\.gz exists already.*--force", capsys.readouterr().err)
    assert main([*command, "--layout", "csv", "--no-meta", "--force"]) == 0
    # What was there is gone: a reader must not meet two layouts.
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["Books.csv"]
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file"), "--like", "amazon-books", "--reviews", "1000"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_command_writes_files_of_a_real_shape(tmp_path, capsys):
    arguments = ["--like", "amazon-books", str(tmp_path / "raw"), "--reviews", "2000", "--layout", "csv"]
    assert main(arguments) == 0
    assert (tmp_path / "raw" / "Books.csv").read_text().count("\n") == 2000
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err
