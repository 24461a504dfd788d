from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from dpo4rec_ray.datasets import amazon2023
from dpo4rec_ray.datasets.files import plan_splits, read_blocks
from dpo4rec_ray.datasets.parsing import (
    BAD_JSON,
    BAD_NUMBER,
    BAD_TIME,
    FIELD_COUNT,
    OUT_OF_RANGE,
    UNRATED,
)
from dpo4rec_ray.datasets.source import EVENTS, ITEMS
from dpo4rec_ray.errors import UserError
from tests.unit.datasets.test_amazon2018 import as_lines, check_mangled, mangled, read, reasons, write_gz

HEADER = b"user_id,parent_asin,rating,timestamp\n"


def review(number: int, **changes: Any) -> dict[str, Any]:
    record = {
        "rating": float(number % 5 + 1),
        "title": "Such a lovely scent",
        "text": 'Said "fine" <br /> {twice}{}',
        "images": [{"small_image_url": "s", "attachment_type": "IMAGE"}],
        "asin": f"V{number}",  # a version of the product
        "parent_asin": f"B{number}",
        "user_id": f"A{number}",
        "timestamp": 1_588_687_728_923 + 1000 * number,
        "helpful_vote": 0,
        "verified_purchase": True,
    }
    return {**record, **changes}


def product(number: int, **changes: Any) -> dict[str, Any]:
    record = {
        "main_category": "Books",
        "title": f"Title {number}",
        "subtitle": "Hardcover",
        "author": {
            "avatar": "https://example.org/a.png",
            "name": "Peter Ackroyd",
            "about": ["Born in London."],
        },
        "average_rating": 4.5,
        "rating_number": 29,
        "price": "8.23",
        "store": "Peter Ackroyd (Author)",
        "categories": ["Books", "Literature & Fiction", "History & Criticism"],
        "details": {"Publisher": "Chatto"},
        "parent_asin": f"B{number}",
    }
    return {**record, **changes}


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl"])
@pytest.mark.parametrize("packed_meta", [True, False, None])
def test_reviews_packed_or_not_with_and_without_metadata(
    tmp_path: Path, ending: str, packed_meta: bool | None
) -> None:
    content = as_lines(review(1), review(2))
    (tmp_path / f"Books{ending}").write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    if packed_meta is not None:
        meta = as_lines(product(1))
        name = "meta_Books.jsonl.gz" if packed_meta else "meta_Books.jsonl"
        (tmp_path / name).write_bytes(gzip.compress(meta) if packed_meta else meta)
    source = amazon2023.describe(str(tmp_path))
    assert (len(source.events), len(source.items)) == (1, int(packed_meta is not None))
    assert source.closed is False
    assert read(source.events[0]).table.to_pylist() == [
        {"user": "A1", "item": "B1", "rating": 2.0, "timestamp_s": 1_588_687_729},
        {"user": "A2", "item": "B2", "rating": 3.0, "timestamp_s": 1_588_687_730},
    ]
    wanted = ["author: Peter Ackroyd", "category: Literature & Fiction", "category: History & Criticism"]
    for file in source.items:
        assert read(file).table.to_pylist() == [{"raw_id": "B1", "title": "Title 1", "attributes": wanted}]


@pytest.mark.parametrize("name", ["Books.csv", "Books.csv.gz"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_ratings_only_has_a_header(tmp_path: Path, name: str, line_end: bytes) -> None:
    content = (HEADER + b"A1,B7,4.0,1588687728923\nA1,B8,0.0,1588687728924\n").replace(b"\n", line_end)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    source = amazon2023.describe(str(tmp_path))
    parsed = read(source.events[0])
    assert (parsed.rows_read, parsed.filtered) == (2, {UNRATED: 1})
    assert parsed.table.to_pylist() == [
        {"user": "A1", "item": "B7", "rating": 4.0, "timestamp_s": 1588687728}
    ]
    assert source.items == ()


@pytest.mark.parametrize(
    "header", ["B7,A1,4.0,1362960000", "user_id,parent_asin,rating,timestamp,history", ""]
)
def test_a_ratings_file_with_another_header_is_refused(tmp_path: Path, header: str) -> None:
    write_gz(tmp_path / "Books.csv.gz", header.encode() + b"\nA1,B7,4.0,1588687728923\n")
    with pytest.raises(
        UserError, match=rf"Books\.csv\.gz: the header is '{header}', not 'user_id,.*rating_only"
    ):
        amazon2023.describe(str(tmp_path))


def test_which_files(tmp_path: Path) -> None:
    for name in ("Books.jsonl.gz", "Books.csv.gz", "meta_Books.jsonl.gz", "meta_All_Beauty.jsonl.gz"):
        write_gz(tmp_path / name, HEADER + b"x\n")
    with pytest.raises(UserError, match=r"set data\.file.*: Books\.csv\.gz, Books\.jsonl\.gz$"):
        amazon2023.describe(str(tmp_path))
    for raw_dir, file in ((tmp_path, "Books.csv.gz"), (tmp_path / "Books.csv.gz", "")):
        source = amazon2023.describe(str(raw_dir), file)
        names = [Path(found.path).name for found in source.events + source.items]
        assert names == ["Books.csv.gz", "meta_Books.jsonl.gz"]
    with pytest.raises(UserError, match=r"no file of interactions \(<Category>\.jsonl\.gz"):
        amazon2023.describe(str(tmp_path / "meta_Books.jsonl.gz"))


def test_a_truncated_download_is_refused(tmp_path: Path) -> None:
    content = gzip.compress(as_lines(*map(review, range(2000))))
    (tmp_path / "Books.jsonl.gz").write_bytes(content[: len(content) // 2])
    (file,) = amazon2023.describe(str(tmp_path)).events
    with pytest.raises(UserError, match=r"Books\.jsonl\.gz.*truncated or damaged"):
        for split in plan_splits((file,)):
            list(read_blocks(split, file))


def test_reviews_that_cannot_be_used_and_those_without_a_rating() -> None:
    records = [
        review(0, rating=0.0),
        review(1, rating=0.5),
        review(2, rating=None),
        review(3, parent_asin=None),
        review(4, user_id=""),
        review(5, timestamp=-1),  # would be second 0 if the division rounded towards zero
        review(6, timestamp=5_000_000_000_000),
        review(7, timestamp="1588687728923"),
        review(8, timestamp=999),
        review(9, timestamp=0),
        {key: value for key, value in review(10).items() if key != "parent_asin"},  # `asin` does not stand in
    ]
    parsed = amazon2023.parse_reviews(as_lines(*records) + b"x\n")
    assert parsed.rows_read == 12
    assert parsed.filtered == {UNRATED: 1}
    assert parsed.table.select(["item", "timestamp_s"]).to_pylist() == [
        {"item": "B8", "timestamp_s": 0},
        {"item": "B9", "timestamp_s": 0},
    ]
    assert reasons(parsed) == [
        *[
            (1, OUT_OF_RANGE),
            (2, "missing field rating"),
            (3, "missing field item"),
            (4, "missing field user"),
            (5, BAD_TIME),
            (6, BAD_TIME),
        ],
        *[(7, BAD_NUMBER), (10, "missing field item"), (11, BAD_JSON)],
    ]


def test_ratings_lines_that_cannot_be_used() -> None:
    content = (
        b"A0,B0,5.0,1588687728923\nA1,B1,5.0\nA2,B2,5.0,x\n,B3,5.0,1588687728923\nA4,B4,9.0,1588687728923\n"
    )
    parsed = amazon2023.parse_ratings(content)
    assert parsed.table["user"].to_pylist() == ["A0"]
    assert reasons(parsed) == [
        (1, FIELD_COUNT),
        (2, BAD_NUMBER),
        (3, "missing field user"),
        (4, OUT_OF_RANGE),
    ]


def test_attributes_name_the_author_or_else_the_brand() -> None:
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"store": "Harmony Books"}, ["author: Peter Ackroyd"]),
        ({"author": None}, ["author: Peter Ackroyd"]),  # from the store
        (
            {"author": None, "store": "A. Writer (Author), M. Painter (Illustrator)  Format: Hardcover"},
            ["author: A. Writer"],
        ),
        ({"author": None, "store": "M. Painter (Illustrator)"}, ["brand: M. Painter (Illustrator)"]),
        ({"author": None, "store": "Howard &amp; Sons"}, ["brand: Howard & Sons"]),
        ({"author": {"name": None}, "store": "HarperCollins"}, ["brand: HarperCollins"]),
        ({"author": {"name": ""}, "store": "HarperCollins"}, ["brand: HarperCollins"]),
        ({"author": {}, "store": "Unknown"}, []),
        ({"author": None, "store": None}, []),
        # another type: as far as it can be read
        ({"author": "Peter Ackroyd", "store": "HarperCollins"}, ["brand: HarperCollins"]),
        ({"author": ["x"], "store": 7}, []),
    ]
    records = [product(number, categories=[], **changes) for number, (changes, _) in enumerate(cases)]
    parsed = amazon2023.parse_products(as_lines(*records))
    assert parsed.table["attributes"].to_pylist() == [wanted for _, wanted in cases]
    alone = [
        amazon2023.parse_products(as_lines(record)).table["attributes"].to_pylist() for record in records
    ]
    assert alone == [[wanted] for _, wanted in cases]


def test_what_is_known_only_after_the_reviews_leaves_no_trace() -> None:
    plain = amazon2023.parse_products(as_lines(product(1)))
    other = amazon2023.parse_products(as_lines(product(1, average_rating=1.0, rating_number=9, price="1.00")))
    assert plain.table.equals(other.table)


def test_products_without_an_id_are_left_out() -> None:
    parsed = amazon2023.parse_products(as_lines(product(0, parent_asin=None), product(1, title="A &amp; B")))
    assert parsed.table["title"].to_pylist() == ["A & B"]
    assert reasons(parsed) == [(0, "missing field item")]


REVIEWS = [as_lines(review(number)) for number in range(70)]
RATINGS = [
    b"A%d,B%d,%d.0,%d\n" % (number, number, number % 5 + 1, 10**12 + 1000 * number) for number in range(70)
]
PRODUCTS = [as_lines(product(number)) for number in range(70)]


@settings(deadline=None, max_examples=150)
@given(mangled(len(REVIEWS) - 1))
def test_any_damage_to_reviews(damage: Callable) -> None:
    check_mangled(amazon2023.parse_reviews, REVIEWS, EVENTS, damage)


@settings(deadline=None, max_examples=150)
@given(mangled(len(RATINGS) - 1))
def test_any_damage_to_ratings(damage: Callable) -> None:
    check_mangled(amazon2023.parse_ratings, RATINGS, EVENTS, damage)


@settings(deadline=None, max_examples=150)
@given(mangled(len(PRODUCTS) - 1))
def test_any_damage_to_products(damage: Callable) -> None:
    check_mangled(amazon2023.parse_products, PRODUCTS, ITEMS, damage)
