from __future__ import annotations

import functools
import gzip
import http.server
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_ray.datasets import amazon2018
from dpo4rec_ray.datasets.files import plan_splits, read_blocks
from dpo4rec_ray.datasets.parsing import (
    BAD_JSON,
    BAD_NUMBER,
    BAD_TIME,
    EMPTY_LINE,
    FIELD_COUNT,
    OUT_OF_RANGE,
)
from dpo4rec_ray.datasets.source import EVENTS, ITEMS, DataFile, Parsed
from dpo4rec_ray.errors import UserError

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "amazon-gift-cards"


def as_lines(*records: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def review(number: int, **changes: Any) -> dict[str, Any]:
    record = {
        "overall": float(number % 5 + 1),
        "verified": True,
        "reviewerID": f"A{number}",
        "asin": f"B{number}",
        "style": {"Format:": " Hardcover"},
        "reviewText": 'Said "fine"; \\frac{a}{b}\n\ttwice \U0001f600',
        "unixReviewTime": 1_500_000_000 + number,
    }
    return {**record, **changes}


def product(number: int, **changes: Any) -> dict[str, Any]:
    record = {
        "category": ["Books", "Fiction"],
        "description": [],
        "title": f"Title {number}",
        "brand": "Jane Doe",
        "rank": "1 in Books (",
        "details": {"ASIN: ": f"B{number}"},
        "price": "$5",
        "asin": f"B{number}",
    }
    return {**record, **changes}


def write_gz(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content))
    return path


def read(file: DataFile) -> Parsed:
    """A small file: one block."""
    blocks = [block for split in plan_splits((file,)) for block in read_blocks(split, file)]
    assert len(blocks) == 1
    return pickle.loads(pickle.dumps(file.parse))(blocks[0].content)


def reasons(parsed: Parsed) -> list[tuple[int, str]]:
    return sorted((bad.row, bad.reason) for bad in parsed.quarantined.shown)


def attributes(*records: dict[str, Any], maker: str = "brand") -> list[list[str]]:
    parsed = amazon2018.parse_products(as_lines(*records), maker)
    assert parsed.table.num_rows == len(records)
    return parsed.table["attributes"].to_pylist()


# ---------------------------------------------------------------- which files


@pytest.mark.parametrize("ending", ["_5.json.gz", "_5.json", ".json.gz", ".json"])
@pytest.mark.parametrize("packed_meta", [True, False, None])
def test_reviews_packed_or_not_with_and_without_metadata(
    tmp_path: Path, ending: str, packed_meta: bool | None
) -> None:
    content = as_lines(review(1), review(2))
    path = tmp_path / f"Books{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    if packed_meta is not None:
        meta = as_lines(product(1))
        name = "meta_Books.json.gz" if packed_meta else "meta_Books.json"
        (tmp_path / name).write_bytes(gzip.compress(meta) if packed_meta else meta)
    source = amazon2018.describe(str(tmp_path))
    assert (len(source.events), len(source.items)) == (1, int(packed_meta is not None))
    assert (source.closed, source.users, source.lists) == (False, (), ())
    assert read(source.events[0]).table.to_pylist() == [
        {"user": "A1", "item": "B1", "rating": 2.0, "timestamp_s": 1_500_000_001},
        {"user": "A2", "item": "B2", "rating": 3.0, "timestamp_s": 1_500_000_002},
    ]
    for file in source.items:
        assert read(file).table.to_pylist() == [
            {"raw_id": "B1", "title": "Title 1", "attributes": ["author: Jane Doe", "category: Fiction"]}
        ]


@pytest.mark.parametrize("name", ["Video_Games.csv", "Video_Games.csv.gz"])
def test_ratings_only_has_the_item_first_and_no_header(tmp_path: Path, name: str) -> None:
    content = b"B7,A1,4.0,1362960000\nB8,A1,1.0,1362960001\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    write_gz(tmp_path / "meta_Video_Games.json.gz", as_lines(product(7, brand="Nintendo")))
    source = amazon2018.describe(str(tmp_path))
    assert read(source.events[0]).table.to_pylist() == [
        {"user": "A1", "item": "B7", "rating": 4.0, "timestamp_s": 1362960000},
        {"user": "A1", "item": "B8", "rating": 1.0, "timestamp_s": 1362960001},
    ]
    assert read(source.items[0]).table["attributes"].to_pylist() == [["brand: Nintendo", "category: Fiction"]]


def test_several_interactions_need_a_name_and_metadata_must_match_the_category(tmp_path: Path) -> None:
    for name in ("Books_5.json.gz", "Books.csv.gz", "All_Beauty.json.gz"):
        write_gz(tmp_path / name, b"x\n")
    write_gz(tmp_path / "meta_Books.json.gz", b"x\n")
    (tmp_path / "README.txt").write_text("x")
    with pytest.raises(
        UserError, match=r"set data\.file.*: All_Beauty\.json\.gz, Books\.csv\.gz, Books_5\.json\.gz$"
    ):
        amazon2018.describe(str(tmp_path))
    books = amazon2018.describe(str(tmp_path), "Books.csv.gz")
    assert [Path(file.path).name for file in books.events + books.items] == [
        "Books.csv.gz",
        "meta_Books.json.gz",
    ]
    assert amazon2018.describe(str(tmp_path), "All_Beauty.json.gz").items == ()
    for wrong in ("Boks.csv.gz", "meta_Books.json.gz", "README.txt"):
        with pytest.raises(UserError, match=rf"data\.file = '{wrong}'.*found: All_Beauty.*README\.txt"):
            amazon2018.describe(str(tmp_path), wrong)


@pytest.mark.parametrize(
    "name", ["ratings_Books.csv", "meta_Books.json.gz", "Books.jsonl.gz", "Books.parquet"]
)
def test_a_folder_without_interactions_of_this_release(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"no file of interactions \(<Category>_5\.json\.gz.*found: {name}"):
        amazon2018.describe(str(tmp_path))


def test_metadata_given_twice(tmp_path: Path) -> None:
    for name in ("Books_5.json", "meta_Books.json", "meta_Books.json.gz"):
        (tmp_path / name).write_bytes(b"x\n")
    with pytest.raises(
        UserError, match=r"metadata of Books twice: .*meta_Books\.json\.gz.*move one elsewhere"
    ):
        amazon2018.describe(str(tmp_path))


def test_raw_dir_may_be_the_file_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gz(tmp_path / "Books_5.json.gz", as_lines(review(1)))
    write_gz(tmp_path / "All_Beauty_5.json.gz", as_lines(review(2)))
    write_gz(tmp_path / "meta_All_Beauty.json.gz", as_lines(product(2)))
    assert amazon2018.describe(str(path)).items == ()
    meta = write_gz(tmp_path / "meta_Books.json.gz", as_lines(product(1)))
    for raw_dir in (str(path), f"file://{path}"):
        source = amazon2018.describe(raw_dir)
        assert [file.path for file in source.events] == [raw_dir]
        assert [file.path.removeprefix("file://") for file in source.items] == [str(meta)]
        assert [read(file).table.num_rows for file in source.events + source.items] == [1, 1]
    assert amazon2018.describe(str(path), "Books_5.json.gz").events == amazon2018.describe(str(path)).events
    with pytest.raises(UserError, match=r"data\.file = 'Books\.csv'"):
        amazon2018.describe(str(path), "Books.csv")
    monkeypatch.chdir(tmp_path)
    assert [file.path for file in amazon2018.describe("Books_5.json.gz").items] == ["meta_Books.json.gz"]


class _Handler(http.server.SimpleHTTPRequestHandler):
    lists = True

    def list_directory(self, path: Any) -> Any:
        return super().list_directory(path) if self.lists else self.send_error(403)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(_Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("lists", [True, False])
def test_a_file_over_http(tmp_path: Path, serve: str, lists: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Handler, "lists", lists)
    write_gz(tmp_path / "Books_5.json.gz", as_lines(review(1)))
    assert amazon2018.describe(f"{serve}/Books_5.json.gz").items == ()
    write_gz(tmp_path / "meta_Books.json.gz", as_lines(product(1)))
    source = amazon2018.describe(f"{serve}/Books_5.json.gz")
    assert [read(file).table.num_rows for file in source.events + source.items] == [1, 1]


def test_a_folder_over_http(tmp_path: Path, serve: str) -> None:
    write_gz(tmp_path / "Books_5.json.gz", as_lines(review(1)))
    write_gz(tmp_path / "meta_Books.json.gz", as_lines(product(1)))
    source = amazon2018.describe(f"{serve}/")
    assert [read(file).table.num_rows for file in source.events + source.items] == [1, 1]


def test_a_truncated_download_is_refused(tmp_path: Path) -> None:
    content = gzip.compress(as_lines(*map(review, range(2000))))
    (tmp_path / "Books_5.json.gz").write_bytes(content[: len(content) // 2])
    (file,) = amazon2018.describe(str(tmp_path)).events
    with pytest.raises(UserError, match=r"Books_5\.json\.gz.*truncated or damaged"):
        for split in plan_splits((file,)):
            list(read_blocks(split, file))
    (tmp_path / "Books_5.json.gz").unlink()
    (tmp_path / "Books_5.json").write_bytes(as_lines(review(1), review(2))[:-20])
    (file,) = amazon2018.describe(str(tmp_path)).events
    with pytest.raises(UserError, match=r"Books_5\.json: the file is truncated"):
        read(file)


# ---------------------------------------------------------------- what a line becomes


def test_reviews_that_cannot_be_used_are_told_by_row_and_reason() -> None:
    without_time = review(3)
    del without_time["unixReviewTime"]
    records = [
        review(0),
        review(1, overall=0.0),
        review(2, overall="5.0"),
        without_time,
        review(4, asin=None),
        review(5, asin=""),
        review(6, unixReviewTime=1_500_000_000_000),
        review(7, unixReviewTime=-1),
        review(8, unixReviewTime=1.5e9),
        review(9, overall=6),
        review(10, overall=True),
        review(11, overall=4),  # an integer is a number too
    ]
    content = (
        as_lines(*records) + b"\n[1]\nnull\n" + as_lines(review(15))[:-20] + b"\n" + as_lines(review(16))
    )
    parsed = amazon2018.parse_reviews(content)
    assert parsed.rows_read == 17
    assert parsed.table["user"].to_pylist() == ["A0", "A11", "A16"]
    assert parsed.row_of is not None and parsed.row_of.tolist() == [0, 11, 16]
    expected = [
        OUT_OF_RANGE,
        BAD_NUMBER,
        "missing field timestamp",
        "missing field item",
        "missing field item",
        BAD_TIME,
        BAD_TIME,
        BAD_NUMBER,
        OUT_OF_RANGE,
    ]
    expected += [BAD_NUMBER]
    assert reasons(parsed) == [
        *zip(range(1, 11), expected, strict=True),
        *[(12, EMPTY_LINE), (13, BAD_JSON), (14, BAD_JSON), (15, BAD_JSON)],
    ]
    texts = {bad.row: bad.text for bad in parsed.quarantined.shown}
    assert all(f'"reviewerID": "A{row}"' in texts[row] for row in [*range(1, 11), 15])


def test_ratings_lines_that_cannot_be_used() -> None:
    content = (
        b"B0,A0,5.0,1362960000\nB1,A1,5.0\nB2,A2,x,1362960000\nB3,A3,0.0,1362960000\nB4,,5.0,1362960000\n"
        b'B5,A5,5.0,1362960000,9\n\nB7,A7,5.0,\nB8,A8,5.0,99999999999\r\nB9,A9,1.0,7\r\n"B,A10,2,8'
    )
    parsed = amazon2018.parse_ratings(content)
    assert parsed.rows_read == 11
    assert parsed.table["item"].to_pylist() == ["B0", "B9", '"B']
    assert reasons(parsed) == [
        *[
            (1, FIELD_COUNT),
            (2, BAD_NUMBER),
            (3, OUT_OF_RANGE),
            (4, "missing field user"),
            (5, FIELD_COUNT),
            (6, EMPTY_LINE),
        ],
        *[(7, BAD_NUMBER), (8, BAD_TIME)],
    ]


def test_a_review_is_kept_whatever_stands_in_the_fields_that_are_not_read() -> None:
    """A lone surrogate and a name twice are refused by pyarrow; bytes that are no UTF-8 are not looked at."""
    line = as_lines(review(1))
    odd = [
        as_lines(review(2, summary="cut \ud83d")),
        line.replace(b'"asin": "B1"', b'"asin": "B0", "asin": "B3"'),
        line.replace(b"fine", b"\xff\xfe"),
        line.replace(b"fine", b"} null {"),
        b"  " + line.rstrip() + b"  \n",
    ]
    for block in [b"".join(odd), *odd]:
        assert amazon2018.parse_reviews(block).quarantined.counts == {}
    table = amazon2018.parse_reviews(b"".join([line, *odd, line])).table
    assert table["item"].to_pylist() == ["B1", "B2", "B3", "B1", "B1", "B1", "B1"]


@pytest.mark.parametrize("stray", [b"null", b"{} null", b"{} null {}", b"{}\tnull null{}", b" null {}"])
def test_a_stray_null_costs_its_line_and_not_the_process(stray: bytes) -> None:
    line = as_lines(review(1))
    for block in (stray, stray + b"\n" + line, line + stray + b"\n" + line):
        parsed = amazon2018.parse_reviews(block)
        assert parsed.quarantined.counts == {BAD_JSON: 1}
        assert parsed.table.num_rows == parsed.rows_read - 1


def test_objects_that_share_a_line_or_span_two_do_not_make_up_for_each_other() -> None:
    line = as_lines(review(1)).rstrip()
    spanning = line.replace(b", ", b",\n", 1)
    parsed = amazon2018.parse_reviews(line + line + b"\n" + spanning + b"\n")
    assert (parsed.rows_read, parsed.table.num_rows, parsed.quarantined.counts) == (3, 0, {BAD_JSON: 3})


def test_scattered_damage_costs_only_the_damaged_lines() -> None:
    lines = [as_lines(review(number)) for number in range(1000)]
    bad = {0, 63, 64, 500, 501, 998, 999}
    block = b"".join(line[:30] + b"\n" if row in bad else line for row, line in enumerate(lines))
    parsed = amazon2018.parse_reviews(block)
    assert parsed.table["user"].to_pylist() == [f"A{number}" for number in range(1000) if number not in bad]
    assert reasons(parsed) == [(row, BAD_JSON) for row in sorted(bad)]


def test_the_author_of_a_book_and_the_brand_of_anything_else() -> None:
    names = {
        "Visit Amazon's Stephen King Page": "Stephen King",
        "Visit Amazon's Jimmy Page Page": "Jimmy Page",
        "J. R. R. Tolkien": "J. R. R. Tolkien",
        "by\n    \n    Amazon": "Amazon",
        " by  Terry ": "Terry",
        "Procter &amp; Gamble": "Procter & Gamble",
        "Unknown": None,
        "unknown": None,
        "": None,
        "x" * 60: "x" * 60,
        "x" * 61: None,
    }
    records = [product(number, brand=brand, category=[]) for number, brand in enumerate(names)]
    records += [product(20, brand=None, category=[]), product(21, brand=5, category=[])]
    wanted = [*names.values(), None, None]
    for maker in ("author", "brand"):
        assert attributes(*records, maker=maker) == [[f"{maker}: {name}"] if name else [] for name in wanted]


def test_the_category_path_below_its_root_four_at_most_without_texts_about_the_product() -> None:
    paths: list[tuple[Any, list[str]]] = [
        (["Books"], []),
        (["Gift Cards", "Gift Cards"], ["Gift Cards"]),
        (["Books", "Sci-Fi &amp; Fantasy", "Sci-Fi & Fantasy", "</span></span>", " "], ["Sci-Fi & Fantasy"]),
        (["R", "a", "b", "x" * 61, "a", "c", "d", "e"], ["a", "b", "c", "d"]),
        (["R", "é" * 60, "é" * 61], ["é" * 60]),
        ([None, "a", None], ["a"]),
        ([], []),
        (None, []),
        # another type: as far as it can be read
        ("Books", []),
        ({"Books": "Fiction"}, []),
        ([["Books", "Fiction"]], []),
        (["Books", 5, "Fiction"], ["Fiction"]),
        (5, []),
    ]
    records = [product(number, brand="", category=path) for number, (path, _) in enumerate(paths)]
    records.append({"asin": "last"})
    wanted = [[f"category: {name}" for name in names] for _, names in paths] + [[]]
    assert attributes(*records) == wanted
    assert [attributes(record)[0] for record in records] == wanted  # and alone


def test_titles_are_cleaned_and_products_without_an_id_are_left_out() -> None:
    script = "var aPageStart = (new Date()).getTime();\nvar ue_t0=ue_t0||+new Date();"
    records = [
        product(0, title=" Maggiano&#39;s <b>Card</b>"),
        product(1, title=script),
        product(2, asin=None),
        product(3, title=None),
        product(4, asin=7),
        product(5, title=["no", "text"]),
        product(6, title=" spaced "),
    ]
    parsed = amazon2018.parse_products(as_lines(*records) + b"{}\n", "brand")
    assert parsed.rows_read == 8
    assert list(zip(parsed.table["raw_id"].to_pylist(), parsed.table["title"].to_pylist(), strict=True)) == [
        ("B0", "Maggiano's Card"),
        ("B1", ""),
        ("B3", None),
        ("B5", None),
        ("B6", "spaced"),
    ]
    assert reasons(parsed) == [(2, "missing field item"), (4, "unreadable"), (7, "missing field item")]
    assert parsed.cleaned == {"titles": 2}


@pytest.mark.skipif(not REAL.exists(), reason="no Amazon gift cards beside the repository")
def test_the_real_gift_cards() -> None:
    source = amazon2018.describe(str(REAL))
    events, items = read(source.events[0]), read(source.items[0])
    assert (events.rows_read, events.table.num_rows, items.rows_read, items.table.num_rows) == (
        2972,
        2972,
        1547,
        1547,
    )
    assert not events.quarantined.counts and not items.quarantined.counts
    assert events.table.slice(0, 1).to_pylist() == [
        {"user": "A31UBHTUUIFJUT", "item": "B004LLIKVU", "rating": 5.0, "timestamp_s": 1529193600}
    ]
    by_id = {row["raw_id"]: row for row in items.table.to_pylist()}
    assert len(by_id) == 1547
    assert by_id["B001BKEWF2"]["title"] == "Serendipity 3 $100.00 Gift Card"
    assert by_id["B001BKEWF2"]["attributes"] == ["brand: Serendipity 3", "category: Gift Cards"]
    assert set(events.table["item"].to_pylist()) <= set(by_id)


# ---------------------------------------------------------------- whatever the bytes

PIECES = (
    *(
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\n",
        b"\n\n",
        b"\r",
        b"\r\n",
        b"\t",
        b'"',
        b"'",
        b"\\",
        b"\\ud800",
        b",",
    ),
    *(
        b"NaN",
        b"-1e999",
        b"9" * 400,
        b"null",
        b"} null {",
        b"{}",
        b"{}{}",
        b"}\n{",
        b"[" * 2000,
        b"}",
        b":",
        b"&#0;",
    ),
)
JUNK = st.one_of(st.binary(max_size=20), st.sampled_from(PIECES))
WAYS = ("delete", "double", "insert", "cut", "replace", "join")


@st.composite
def mangled(draw: st.DrawFn, num_lines: int) -> Callable[[list[bytes]], tuple[bytes, list[int]]]:
    """A way to damage lines: gives the block and which lines it left alone."""
    rows = draw(st.lists(st.integers(0, num_lines - 1), max_size=4, unique=True))
    ways = [(draw(st.sampled_from(WAYS)), draw(JUNK)) for _ in rows]
    places = [sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1)))) for _ in rows]

    def apply(lines: list[bytes]) -> tuple[bytes, list[int]]:
        lines, touched = list(lines), set(rows)
        for row, (way, junk), (low, high) in zip(rows, ways, places, strict=True):
            line, end = lines[row][:-1], lines[row][-1:]
            start, stop = int(low * len(line)), int(high * len(line))
            if way == "delete":
                line = line[:start] + line[stop:]
            elif way == "double":
                line = line[:stop] + line[start:]
            elif way == "insert":
                line = line[:start] + junk + line[start:]
            elif way == "cut":
                line = line[:start]
            elif way == "replace":
                line = junk
            else:
                end = b""
                touched.add(row + 1)
            lines[row] = line + end
        return b"".join(lines), [row for row in range(len(lines)) if row not in touched]

    return apply


def check_mangled(
    parse: Callable[[bytes], Parsed],
    lines: list[bytes],
    schema: pa.Schema,
    damage: Callable[[list[bytes]], tuple[bytes, list[int]]],
) -> None:
    """No row is lost or made up, no good line suffers, and no line's fate hangs on the lines beside it."""
    good = parse(b"".join(lines)).table.to_pylist()
    assert len(good) == len(lines)
    block, untouched = damage(lines)
    parsed = parse(block)
    assert parsed.table.schema == schema
    parsed.table.validate(full=True)
    left_out = sum(parsed.quarantined.counts.values()) + sum(parsed.filtered.values())
    assert parsed.rows_read == parsed.table.num_rows + left_out
    rows = parsed.table.to_pylist()
    remaining = iter(rows)
    assert all(good[row] in remaining for row in untouched)  # in file order
    texts = block.replace(b"\r\n", b"\n").split(b"\n")
    texts = texts if texts[-1] else texts[:-1]
    assert parsed.rows_read == len(texts)
    for bad in parsed.quarantined.shown:
        assert bad.text == texts[bad.row].decode("utf-8", "backslashreplace")[:200]
    known = {line.rstrip(b"\n"): [row] for line, row in zip(lines, good, strict=True)}
    alone = [known.get(text) or parse(text + b"\n").table.to_pylist() for text in texts]
    assert rows == [row for found in alone for row in found]


REVIEWS = [as_lines(review(number)) for number in range(70)]  # more than are looked at one by one
RATINGS = [b"B%d,A%d,%d.0,%d\n" % (number, number, number % 5 + 1, 10**9 + number) for number in range(70)]
PRODUCTS = [as_lines(product(number, brand=f"Maker {number}")) for number in range(70)]


@settings(deadline=None, max_examples=150)
@given(mangled(len(REVIEWS) - 1))
def test_any_damage_to_reviews(damage: Callable) -> None:
    check_mangled(amazon2018.parse_reviews, REVIEWS, EVENTS, damage)


@settings(deadline=None, max_examples=150)
@given(mangled(len(RATINGS) - 1))
def test_any_damage_to_ratings(damage: Callable) -> None:
    check_mangled(amazon2018.parse_ratings, RATINGS, EVENTS, damage)


@settings(deadline=None, max_examples=150)
@given(mangled(len(PRODUCTS) - 1))
def test_any_damage_to_products(damage: Callable) -> None:
    check_mangled(functools.partial(amazon2018.parse_products, maker="author"), PRODUCTS, ITEMS, damage)
