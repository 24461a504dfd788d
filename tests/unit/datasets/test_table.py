"""Own tables: every format gives the same rows, a bad cell costs its row only, a wrong mapping is told up front."""

from __future__ import annotations

import bz2
import contextlib
import decimal
import gzip
import http.server
import json
import pickle
import threading
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_ray.config.data import TableSection
from dpo4rec_ray.datasets import files
from dpo4rec_ray.datasets.cells import Column, converted, way_to_read_time
from dpo4rec_ray.datasets.column_mapping import matching_files
from dpo4rec_ray.datasets.parsing import (
    BAD_JSON,
    BAD_NUMBER,
    BAD_TIME,
    EMPTY_LINE,
    FIELD_COUNT,
    OPEN_QUOTE,
    OUT_OF_RANGE,
    UNREADABLE,
    WRONG_ENCODING,
)
from dpo4rec_ray.datasets.source import EVENTS, ITEMS, USERS, DataFile, Parsed
from dpo4rec_ray.datasets.table import describe
from dpo4rec_ray.errors import UserError

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
# 2024-05-01T10:00:00Z is day 19,844 after 1970: 19,844 * 86,400 + 36,000.
MAY_DAY_S = 1_714_521_600
MORNING_S = 1_714_557_600
ROWS = [("u1", "a", 4.0, MORNING_S), ("u2", "b", 2.5, MORNING_S + 60), ("u1", "c", 5.0, MORNING_S + 120)]
TABLE = pa.table(list(map(list, zip(*ROWS, strict=True))), names=EVENTS.names).cast(EVENTS)
CSV = b"user_id,item_id,rating,timestamp\n" + b"".join(
    b"%s,%s,%g,%d\n" % (u.encode(), i.encode(), r, t) for u, i, r, t in ROWS
)
JSONL = b"".join(
    json.dumps({"user_id": u, "item_id": i, "rating": r, "timestamp": t, "more": {"x": [None]}}).encode()
    + b"\n"
    for u, i, r, t in ROWS
)
FUZZ = settings(max_examples=150, deadline=None)


def read(described: tuple[DataFile, ...], split_bytes: int = 2**20) -> list[Parsed]:
    """What a stage does: every block of every split, in file order."""
    parsed: list[Parsed] = []
    for split in files.plan_splits(described, split_bytes):
        file = described[split.file]
        assert file.parse is not None
        parse: Callable[..., Parsed] = pickle.loads(pickle.dumps(file.parse))
        if file.kind == "parquet":
            parsed.append(parse(files.read_row_group(split, file.columns)))
        else:
            parsed += [parse(block.content) for block in files.read_blocks(split, file)]
    for one in parsed:
        assert one.rows_read == one.table.num_rows + one.quarantined.counts.total() + one.filtered.total()
    return parsed


def rows_of(described: tuple[DataFile, ...]) -> list[dict]:
    return pa.concat_tables([one.table for one in read(described)]).to_pylist()


def bad_rows(parsed: Parsed) -> list[tuple[int, str]]:
    return sorted((bad.row, bad.reason) for bad in parsed.quarantined.shown)


def write_parquet(path: Path, **columns: list) -> None:
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("e.csv", CSV),
        ("e.csv", CSV.removesuffix(b"\n")),  # the last line end is often missing
        ("e.csv", CSV.replace(b"\n", b"\r\n")),
        ("e.csv", b"\xef\xbb\xbf" + CSV),
        ("e.csv.gz", gzip.compress(CSV, mtime=0)),
        ("e.csv.bz2", bz2.compress(CSV)),
        ("E.CSV", CSV),
        ("e.tsv", CSV.replace(b",", b"\t")),
        ("e.jsonl", JSONL),
        ("e.json", JSONL),
        ("e.jsonl.gz", gzip.compress(JSONL, mtime=0)),
    ],
)
def test_text_formats_give_the_same_events_in_file_order(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    source = describe(str(tmp_path), TableSection(interactions=name))
    (parsed,) = read(source.events)
    assert parsed.table.equals(TABLE) and parsed.rows_read == 3
    assert not source.closed and source.items == source.users == source.lists == ()
    assert not source.events[0].complete


def test_parquet_gives_the_same_events_one_block_per_row_group(tmp_path: Path):
    table = pa.table({"user_id": TABLE["user"], "item_id": TABLE["item"], "rating": TABLE["rating"],
                      "timestamp": TABLE["timestamp_s"], "more": [[1]] * 3})  # fmt: skip
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=2)
    parsed = read(describe(str(tmp_path), TableSection(interactions="e.parquet")).events)
    assert [one.table.num_rows for one in parsed] == [2, 1]
    assert pa.concat_tables([one.table for one in parsed]).equals(TABLE)


def test_ids_become_text_whatever_their_type():
    column = Column("table.user", "x", "id", "y")

    def texts(array: pa.Array) -> list:
        return converted(pa.table({"x": array}), (column,))["y"].to_pylist()

    assert texts(pa.array([5, None, -1])) == ["5", None, "-1"]
    assert texts(pa.array([2**64 - 1], pa.uint64())) == ["18446744073709551615"]
    assert texts(pa.array([5.0, None, 1e6, 0.5, float("nan")])) == ["5", None, "1000000", "0.5", None]
    assert texts(pa.array([1e300, float("inf")])) == ["1e+300", None]
    assert texts(pa.array([16_777_216.0, 5.1], pa.float32())) == ["16777216", "5.1"]
    assert texts(pa.array([decimal.Decimal(7)], pa.decimal128(38, 0))) == ["7"]
    assert texts(pa.array(["x", None, "y", "x"]).dictionary_encode()) == ["x", None, "y", "x"]
    for kind in (pa.large_string(), pa.string_view(), pa.binary()):
        assert texts(pa.array(["x", None]).cast(kind)) == ["x", None]


@pytest.mark.parametrize(
    ("unit", "value", "expected"),
    [
        ("s", MORNING_S, MORNING_S),
        ("ms", MORNING_S * 1000 + 999, MORNING_S),
        ("us", MORNING_S * 1_000_000 + 999_999, MORNING_S),
        ("ns", MORNING_S * 10**9, MORNING_S),
        ("ns", MORNING_S * 10**9 + 999_999_000, MORNING_S),
        ("ns", str(MORNING_S * 10**9), MORNING_S),
        ("s", MORNING_S + 0.75, MORNING_S),
        ("s", str(MORNING_S), MORNING_S),
        ("ms", f" {MORNING_S}123.0 ", MORNING_S),
        ("s", date(2024, 5, 1), MAY_DAY_S),
        ("s", datetime(2024, 5, 1, 10, 0, 0, 5), MORNING_S),
        ("iso", datetime(2024, 5, 1, 12, tzinfo=timezone(timedelta(hours=2))), MORNING_S),
        ("iso", "2024-05-01", MAY_DAY_S),
        ("iso", "2024-05-01T10:00:00", MORNING_S),
        ("iso", "2024-05-01 10:00", MORNING_S),
        ("iso", "2024-05-01T10:00:00Z", MORNING_S),
        ("iso", "2024-05-01T10:00:00.999999Z", MORNING_S),
        ("iso", "2024-05-01 12:00:00+02:00", MORNING_S),
        ("iso", "2024-05-01T10:00:00.123456789", MORNING_S),
        ("iso", " 2024-05-01 10:00:00 ", MORNING_S),  # this one and the next are read one by one
        ("iso", "20240501T100000Z", MORNING_S),
    ],
)
def test_times_become_seconds(unit: str, value: object, expected: int):
    column = Column("table.timestamp", "x", "time", "y", unit=unit)  # type: ignore[arg-type]
    assert converted(pa.table({"x": [value, None]}), (column,))["y"].to_pylist() == [expected, None]


def test_times_of_every_parquet_type_and_mixed_text():
    column = Column("table.timestamp", "x", "time", "y", unit="iso")

    def seconds(array: pa.Array) -> list:
        return converted(pa.table({"x": array}), (column,))["y"].to_pylist()

    for unit, factor in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        for zone in (None, "UTC", "Europe/Paris"):
            assert seconds(pa.array([MORNING_S * factor], pa.timestamp(unit, zone))) == [MORNING_S]
    assert seconds(pa.array([date(2024, 5, 1)], pa.date32())) == [MAY_DAY_S]
    assert seconds(pa.array([date(2024, 5, 1)], pa.date64())) == [MAY_DAY_S]
    mixed = ["2024-05-01T10:00:00", "2024-05-01T10:00:00Z", "yesterday", "2024-02-30", "9999-12-31"] * 40
    assert seconds(pa.array(mixed)) == [MORNING_S, MORNING_S, None, None, 253_402_214_400] * 40


CSV_TROUBLE = [
    (b"u1,a,4,100", ""),
    (b"u1,a,4", FIELD_COUNT),
    (b"u1,a,4,100,9", FIELD_COUNT),
    (b"", EMPTY_LINE),
    (b",a,4,100", "missing field user"),
    (b"u1,,4,100", "missing field item"),
    (b"u1,a,,100", "missing field rating"),
    (b"u1,a,4,", "missing field timestamp"),
    (b"u1,a,good,100", BAD_NUMBER),
    (b"u1,a,9.5,100", OUT_OF_RANGE),
    (b"u1,a,-1,100", OUT_OF_RANGE),
    (b"u1,a,nan,100", OUT_OF_RANGE),
    (b"u1,a,1e999,100", OUT_OF_RANGE),
    (b"u1,a,4,soon", BAD_TIME),
    (b"u1,a,4,-5", BAD_TIME),
    (b"u1,a,4,1714557600000", BAD_TIME),  # milliseconds
    (b"u1,a,4,99999999999999999999999", BAD_TIME),
    (b'u1,"a,4,100', OPEN_QUOTE),  # a quote that is never closed must not swallow the next lines
    (b'u1,a,4,"100', OPEN_QUOTE),
    (b"u1,\xff\xfe,4,100", WRONG_ENCODING),
    (b"u1,a\ru2,b,4,100", UNREADABLE),
    (b'"u,1","a ""b""",4.5,100', ""),
    (b"u1,a, 4 , 100 ", ""),
    (b"u1,a,4.,100.9", ""),
    (b"u1,a,4,100", ""),
]


def test_csv_quarantines_what_is_bad_and_nothing_else(tmp_path: Path):
    (tmp_path / "e.csv").write_bytes(
        CSV.split(b"\n")[0] + b"\n" + b"\n".join(line for line, _ in CSV_TROUBLE)
    )
    (parsed,) = read(describe(str(tmp_path), TableSection(interactions="e.csv")).events)
    assert bad_rows(parsed) == [(row, reason) for row, (_, reason) in enumerate(CSV_TROUBLE) if reason]
    texts = {bad.row: bad.text for bad in parsed.quarantined.shown}
    assert texts[8] == "u1,a,good,100" and texts[19] == "u1,\\xff\\xfe,4,100"
    good = [row for row, (_, reason) in enumerate(CSV_TROUBLE) if not reason]
    assert parsed.row_of is not None and parsed.row_of.tolist() == good
    assert parsed.table.to_pylist()[1] == {"user": "u,1", "item": 'a "b"', "rating": 4.5, "timestamp_s": 100}
    assert parsed.table["timestamp_s"].to_pylist() == [100] * len(good)


def test_csv_line_does_not_depend_on_where_its_block_ends(tmp_path: Path):
    """Every line alone, as the last of two and as the first of two: always the same verdict."""
    (tmp_path / "e.csv").write_bytes(CSV)
    parse = describe(str(tmp_path), TableSection(interactions="e.csv")).events[0].parse
    assert parse is not None
    for line, reason in CSV_TROUBLE[:3] + CSV_TROUBLE[4:]:  # an empty block has no line
        for before, after in ((b"", b""), (b"v,b,3,7\n", b""), (b"", b"v,b,3,7\n")):
            parsed = parse(before + line + b"\n" + after)
            assert list(parsed.quarantined.counts) == ([reason] if reason else []), (line, before, after)


def test_csv_damage_that_cancels_out_in_the_count_of_rows(tmp_path: Path):
    """A quote joins two lines and a carriage return splits one: three lines, three rows, none of them a line."""
    (tmp_path / "e.csv").write_bytes(CSV)
    parse = describe(str(tmp_path), TableSection(interactions="e.csv")).events[0].parse
    assert parse is not None
    parsed = parse(b'u3,"c\nd",4,100\nu1,a,4,100\ru2,b,3,7\nu4,e,5,101\n')
    assert bad_rows(parsed) == [(0, OPEN_QUOTE), (1, FIELD_COUNT), (2, UNREADABLE)]
    assert parsed.table["user"].to_pylist() == ["u4"]


def test_a_byte_order_mark_within_the_file_is_part_of_its_field_wherever_a_block_begins(tmp_path: Path):
    (tmp_path / "e.csv").write_bytes(CSV)
    parse = describe(str(tmp_path), TableSection(interactions="e.csv")).events[0].parse
    assert parse is not None
    marked = b"\xef\xbb\xbfu3,c,4,100\n"
    for block in (marked, b"u1,a,4,100\n" + marked):
        assert parse(block).table["user"].to_pylist()[-1] == "\ufeffu3"


JSON_TROUBLE = [
    ('{"user_id": "u1", "item_id": 7, "rating": 4, "timestamp": 100}', ""),
    ('{"user_id": 5, "item_id": "x7", "rating": 4.5, "timestamp": "100"}', ""),  # other types than the first line
    ('{"user_id": 5.0, "item_id": 123456789012345678901234567890, "rating": "3", "timestamp": 1e2}', ""),
    ('{"timestamp": 100, "rating": 4, "item_id": 7, "user_id": "u1"}  ', ""),
    ('{"user_id": "u1", "item_id": 7, "rating": 4}', "missing field timestamp"),
    ('{"user_id": null, "item_id": 7, "rating": 4, "timestamp": 100}', "missing field user"),
    ('{"user_id": "", "item_id": 7, "rating": 4, "timestamp": 100}', "missing field user"),
    ("{}", "missing field user"),
    ('{"user_id": "u1", "item_id": 7, "rating": "good", "timestamp": 100}', BAD_NUMBER),
    ('{"user_id": "u1", "item_id": 7, "rating": 9, "timestamp": 100}', OUT_OF_RANGE),
    ('{"user_id": "u1", "item_id": 7, "rating": NaN, "timestamp": 100}', OUT_OF_RANGE),
    ('{"user_id": "u1", "item_id": 7, "rating": 4, "timestamp": "soon"}', BAD_TIME),
    ('{"user_id": ["u1"], "item_id": 7, "rating": 4, "timestamp": 100}', UNREADABLE),
    ('{"user_id": {"id": 1}, "item_id": 7, "rating": 4, "timestamp": 100}', UNREADABLE),
    ('{"user_id": "\\ud800", "item_id": 7, "rating": 4, "timestamp": 100}', UNREADABLE),
    ('{"user_id": NaN, "item_id": 7, "rating": 4, "timestamp": 100}', UNREADABLE),
    ('{"user_id": 1e999, "item_id": 7, "rating": 4, "timestamp": 100}', UNREADABLE),
    ("null", BAD_JSON),
    ("[1, 2]", BAD_JSON),
    ("{" * 100_000, BAD_JSON),
    ('{"user_id": "u1", "item_id": 7, "rating": 4, "timestamp": 100}{}', BAD_JSON),
    ('{"user_id": "u1", "item_id": 7,', BAD_JSON),  # one object over two lines
    ('"rating": 4, "timestamp": 100}', BAD_JSON),
    ("   ", EMPTY_LINE),
    ('{"user_id": "u1", "item_id": 7, "rating": 4, "timestamp": 100, "more": ' + "[" * 5000 + "]" * 5000 + "}", ""),
]  # fmt: skip


def test_jsonl_quarantines_what_is_bad_and_nothing_else(tmp_path: Path):
    (tmp_path / "e.jsonl").write_text("\n".join(line for line, _ in JSON_TROUBLE))
    (parsed,) = read(describe(str(tmp_path), TableSection(interactions="e.jsonl")).events)
    assert bad_rows(parsed) == [(row, reason) for row, (_, reason) in enumerate(JSON_TROUBLE) if reason]
    good = parsed.table.to_pylist()
    assert [row["user"] for row in good] == ["u1", "5", "5", "u1", "u1"]
    assert [row["item"] for row in good] == ["7", "x7", "123456789012345678901234567890", "7", "7"]
    assert [row["rating"] for row in good] == [4.0, 4.5, 3.0, 4.0, 4.0]
    assert [row["timestamp_s"] for row in good] == [100] * 5


def test_jsonl_block_of_nulls_does_not_crash_the_reader(tmp_path: Path):
    """pyarrow's own reader ends the process on it (apache/arrow #47409)."""
    (tmp_path / "e.jsonl").write_bytes(JSONL)
    parse = describe(str(tmp_path), TableSection(interactions="e.jsonl")).events[0].parse
    assert parse is not None
    parsed = parse(b"null\n" * 200)
    assert parsed.quarantined.counts == {BAD_JSON: 200} and parsed.table.schema == EVENTS
    parsed = parse(b"{}null{}\n" + JSONL + b"{} null\n")
    assert bad_rows(parsed) == [(0, BAD_JSON), (4, BAD_JSON)] and parsed.table.equals(TABLE)


def test_parquet_rows_are_quarantined_with_what_they_hold(tmp_path: Path):
    users = pa.array([b"u1", b"\xff", b"u3", b"u4", None, b"u6", b"u7"]).cast(pa.binary())
    table = pa.table(
        {
            "user_id": pa.Array.from_buffers(pa.string(), 7, users.buffers()),  # text that is not UTF-8
            "item_id": [1, 2, 3, 4, 5, None, 7],
            "rating": ["4", "4", "abc", "11", "4", "4", " 3.5 "],
            "timestamp": [100, 100, 100, 100, 100, 100, 2**62],
        }
    )
    pq.write_table(table, tmp_path / "e.parquet")
    (parsed,) = read(describe(str(tmp_path), TableSection(interactions="e.parquet")).events)
    assert parsed.table.to_pylist() == [{"user": "u1", "item": "1", "rating": 4.0, "timestamp_s": 100}]
    assert bad_rows(parsed) == [
        (1, UNREADABLE), (2, BAD_NUMBER), (3, OUT_OF_RANGE), (4, "missing field user"),
        (5, "missing field item"), (6, BAD_TIME),
    ]  # fmt: skip
    texts = {bad.row: bad.text for bad in parsed.quarantined.shown}
    assert texts[1] == "user_id=b'\\xff', item_id=2, rating='4', timestamp=100"
    assert texts[2] == "user_id='u3', item_id=3, rating='abc', timestamp=100"


def test_parquet_bad_cells_among_many_rows(tmp_path: Path):
    """Halving finds each of them: 3 in 1,000 rows, in the first, middle and last place."""
    ratings = ["4"] * 1000
    for place in (0, 500, 999):
        ratings[place] = "bad"
    write_parquet(tmp_path / "e.parquet", user_id=list(range(1000)), item_id=list(range(1000)), rating=ratings,
                  timestamp=["2024-05-01"] * 1000)  # fmt: skip
    (parsed,) = read(
        describe(str(tmp_path), TableSection(interactions="e.parquet", timestamp_unit="iso")).events
    )
    assert bad_rows(parsed) == [(0, BAD_NUMBER), (500, BAD_NUMBER), (999, BAD_NUMBER)]
    assert parsed.table["user"].to_pylist() == [str(n) for n in range(1000) if n not in (0, 500, 999)]


def test_implicit_feedback_counts_every_event_as_rated_1(tmp_path: Path):
    (tmp_path / "e.csv").write_text("who,what,when\nu1,a,100\nu2,b,-1\n")
    mapping = TableSection(
        interactions="e.csv", user="who", item="what", rating="", timestamp="when", min_rating=3
    )
    (parsed,) = read(describe(str(tmp_path), mapping).events)
    assert parsed.table.to_pylist() == [{"user": "u1", "item": "a", "rating": 1.0, "timestamp_s": 100}]
    assert bad_rows(parsed) == [(1, BAD_TIME)]


def test_items_titles_and_attributes_in_every_format(tmp_path: Path):
    expected = [
        {
            "raw_id": "1",
            "title": "Tom & Jerry",
            "attributes": ["genre: Comedy", "genre: Animation", "author: Hanna"],
        },
        {"raw_id": "2", "title": "Heat", "attributes": ["author: Mann"]},
        {"raw_id": "3", "title": None, "attributes": []},
    ]
    write_parquet(tmp_path / "e.parquet", user_id=["u"], item_id=[1], rating=[4.0], timestamp=[100])
    (tmp_path / "i.csv").write_text(
        "item_id,title,genres,author\n1,Tom &amp; Jerry,Comedy| Animation |Comedy,Hanna\n2, Heat,,Mann\n3,,|,\n,No id,x,y\n"
    )
    rows = [
        {"item_id": 1, "title": "Tom & Jerry", "genres": ["Comedy", "Animation"], "author": "Hanna"},
        {"item_id": 2, "title": "Heat", "genres": [], "author": "Mann"},
        {"item_id": 3, "title": None, "genres": None, "author": None},
        {"item_id": None, "title": "No id", "genres": ["x", None], "author": "y"},
    ]
    (tmp_path / "i.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "i.parquet")
    mapping = TableSection(interactions="e.parquet", attributes={"genre": "genres", "author": "author"})
    for name in ("i.csv", "i.jsonl", "i.parquet"):
        (parsed,) = read(describe(str(tmp_path), mapping.model_copy(update={"items": name})).items)
        assert parsed.table.to_pylist() == expected and parsed.table.schema == ITEMS
        assert bad_rows(parsed) == [(3, "missing field item")]
    plain = mapping.model_copy(
        update={"items": "i.csv", "title": "", "attributes": {"genre": "genres"}, "attribute_separator": ""}
    )
    (parsed,) = read(describe(str(tmp_path), plain).items)
    assert parsed.table["title"].null_count == 3
    assert parsed.table["attributes"].to_pylist() == [["genre: Comedy| Animation |Comedy"], [], ["genre: |"]]


def test_attributes_may_be_numbers_dates_or_mixed_lists(tmp_path: Path):
    write_parquet(tmp_path / "e.parquet", user_id=["u"], item_id=[1], rating=[4.0], timestamp=[100])
    write_parquet(tmp_path / "i.parquet", item_id=[1, 2], title=[7, 8], year=[1995.0, None], codes=[[3, 4], None],
                  out=[date(2024, 5, 1), None])  # fmt: skip
    (tmp_path / "i.jsonl").write_text(
        '{"item_id": 1, "title": 7, "year": 1995.0, "codes": [3, "4"], "out": "2024-05-01"}\n'
        '{"item_id": 2, "title": 8, "codes": []}\n'
    )
    mapping = TableSection(
        interactions="e.parquet", attributes={"year": "year", "code": "codes", "out": "out"}
    )
    for name in ("i.parquet", "i.jsonl"):
        (parsed,) = read(describe(str(tmp_path), mapping.model_copy(update={"items": name})).items)
        assert parsed.table.to_pylist() == [
            {
                "raw_id": "1",
                "title": "7",
                "attributes": ["year: 1995", "code: 3", "code: 4", "out: 2024-05-01"],
            },
            {"raw_id": "2", "title": "8", "attributes": []},
        ]


def test_attributes_stay_with_their_items_in_the_order_of_the_facets(tmp_path: Path):
    (tmp_path / "e.csv").write_bytes(CSV)
    cells = [f"{n},T{n},x{n}|y|z{n % 3},a{n}\n" for n in range(100)]
    (tmp_path / "i.csv").write_text("item_id,title,genres,author\n" + "".join(cells))
    mapping = TableSection(
        interactions="e.csv", items="i.csv", attributes={"by": "author", "genre": "genres"}
    )
    (parsed,) = read(describe(str(tmp_path), mapping).items)
    assert parsed.table["attributes"].to_pylist() == [
        [f"by: a{n}", f"genre: x{n}", "genre: y", f"genre: z{n % 3}"] for n in range(100)
    ]


def test_users_and_their_profiles(tmp_path: Path):
    (tmp_path / "e.csv").write_bytes(CSV)
    (tmp_path / "u.csv").write_text("user_id,age,country\nu1,25,NL\nu2,, <b>FR</b>\nu3,,\n,30,DE\n")
    mapping = TableSection(interactions="e.csv", users="u.csv", profile=("age", "country"))
    (parsed,) = read(describe(str(tmp_path), mapping).users)
    assert parsed.table.schema == USERS
    assert parsed.table.to_pylist() == [
        {"raw_id": "u1", "profile": "age: 25, country: NL"},
        {"raw_id": "u2", "profile": "country: FR"},
        {"raw_id": "u3", "profile": ""},
    ]
    assert bad_rows(parsed) == [(3, "missing field user")] and parsed.cleaned == {"profiles": 1}
    assert parsed.row_of is not None and parsed.row_of.tolist() == [0, 1, 2]
    (parsed,) = read(describe(str(tmp_path), mapping.model_copy(update={"profile": ()})).users)
    assert parsed.table["profile"].to_pylist() == ["", "", ""]


def test_patterns_take_several_files_and_each_has_its_own_columns(tmp_path: Path):
    (tmp_path / "day=1").mkdir()
    (tmp_path / "day=2").mkdir()
    (tmp_path / "day=1" / "p0.csv").write_text("user_id,item_id,rating,timestamp\nu1,a,1,1\n")
    (tmp_path / "day=1" / "p1.csv").write_text("rating,timestamp,item_id,user_id\n2,2,b,u1\n")
    (tmp_path / "day=2" / "p0.csv").write_text("user_id,item_id,rating,timestamp\nu1,c,3,3\n")
    (tmp_path / "day=2" / ".hidden.csv").write_text("no")
    (tmp_path / "day=2" / "sub.csv").mkdir()
    rows = rows_of(describe(str(tmp_path), TableSection(interactions="day=*/*.csv")).events)
    assert [(row["item"], row["rating"]) for row in rows] == [("a", 1.0), ("b", 2.0), ("c", 3.0)]
    assert matching_files(str(tmp_path), "day=1/p[1-9].csv", "k") == [f"{tmp_path}/day=1/p1.csv"]
    assert matching_files(f"{tmp_path}/", "/day=1/p?.csv", "k") == [
        f"{tmp_path}/day=1/p{n}.csv" for n in (0, 1)
    ]


def test_uris_through_pyarrow_and_fsspec(tmp_path: Path):
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "a.csv").write_bytes(CSV)
    (tmp_path / "events" / "b.jsonl.gz").write_bytes(gzip.compress(JSONL))
    memory = fsspec.filesystem("memory")
    for name in ("a.csv", "b.jsonl.gz"):
        memory.pipe(f"/test_table/events/{name}", (tmp_path / "events" / name).read_bytes())
    memory.pipe("/test_table/none.txt", b"")
    for root in (tmp_path.as_uri(), "memory://test_table"):
        described = describe(root, TableSection(interactions="events/*")).events
        assert [file.path for file in described] == [f"{root}/events/a.csv", f"{root}/events/b.jsonl.gz"]
        assert [one.table.equals(TABLE) for one in read(described)] == [True, True]
        with pytest.raises(
            UserError, match=r"no file matches table\.interactions = 'x\*'; the folder holds: events"
        ):
            describe(root, TableSection(interactions="x*"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A web server without ranges, as Python's own is."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def web_server(folder: Path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_csv_over_http(tmp_path: Path):
    (tmp_path / "e.csv").write_bytes(CSV)
    with web_server(tmp_path) as root:
        (parsed,) = read(describe(root, TableSection(interactions="e.csv")).events)
        with pytest.raises(UserError, match=r"no file matches table\.interactions = 'other\.csv'"):
            describe(root, TableSection(interactions="other.csv"))
    assert parsed.table.equals(TABLE)


def test_a_missing_column_is_told_before_anything_is_read(tmp_path: Path):
    (tmp_path / "e.csv").write_bytes(CSV)
    (tmp_path / "e.jsonl").write_bytes(JSONL)
    write_parquet(tmp_path / "e.parquet", user_id=["u"], item_id=[1], rating=[4.0], timestamp=[100])
    for name in ("e.csv", "e.jsonl", "e.parquet"):
        with pytest.raises(UserError) as error:
            describe(str(tmp_path), TableSection(interactions=name, timestamp="time"))
        assert f"{tmp_path}/{name}: the column 'time' (table.timestamp) is not there" in str(error.value)
        assert "columns found: user_id, item_id, rating, timestamp" in str(error.value)
        assert "\n" not in str(error.value)
    for key, change in (
        ("table.item_id", {"item_id": "no"}),
        ("table.title", {"title": "no"}),
        ("table.attributes.genre", {"attributes": {"genre": "no"}}),
    ):
        mapping = TableSection(interactions="e.csv", items="e.csv", title="")
        with pytest.raises(UserError, match=rf"'no' \({key}\) is not there"):
            describe(str(tmp_path), mapping.model_copy(update=change))
    with pytest.raises(UserError, match=r"'no' \(table\.profile\) is not there"):
        describe(str(tmp_path), TableSection(interactions="e.csv", users="e.csv", profile=("no",)))


def test_json_keys_may_be_missing_in_the_first_line(tmp_path: Path):
    (tmp_path / "e.jsonl").write_bytes(b'damaged\n{"user_id": "u0", "rating": null}\n' + JSONL)
    (parsed,) = read(describe(str(tmp_path), TableSection(interactions="e.jsonl")).events)
    assert bad_rows(parsed) == [(0, BAD_JSON), (1, "missing field item")] and parsed.table.equals(TABLE)


@pytest.mark.parametrize(
    ("column", "values", "told"),
    [
        ("rating", [[4.0]], r"'rating' \(table\.rating\) is of type list<.*>; it must hold numbers"),
        ("rating", [{"stars": 4}], r"'rating' \(table\.rating\) is of type struct"),
        (
            "user_id",
            [[1]],
            r"'user_id' \(table\.user\) is of type list<.*>; it must hold text or whole numbers",
        ),
        ("item_id", [True], r"'item_id' \(table\.item\) is of type bool"),
        ("timestamp", [5], r"\(table\.timestamp\) is of type int64; .*set timestamp_unit to s, ms, us or ns"),
    ],
)
def test_a_column_of_the_wrong_type_is_told_before_anything_is_read(
    tmp_path: Path, column: str, values: list, told: str
):
    good = {"user_id": ["u"], "item_id": ["a"], "rating": [4.0], "timestamp": ["2024-05-01"]}
    write_parquet(tmp_path / "e.parquet", **{**good, column: values})
    row = {name: cells[0] for name, cells in {**good, column: values}.items()}
    (tmp_path / "e.jsonl").write_text(json.dumps(row) + "\n")
    for name in ("e.parquet", "e.jsonl"):
        with pytest.raises(UserError, match=told):
            describe(str(tmp_path), TableSection(interactions=name, timestamp_unit="iso"))


def test_other_mistakes_are_told(tmp_path: Path):
    (tmp_path / "twice.csv").write_text("user_id,item_id,rating,rating,timestamp\nu,a,1,2,3\n")
    (tmp_path / "e.xlsx").write_bytes(b"PK")
    (tmp_path / "e.parquet.gz").write_bytes(b"x")
    (tmp_path / "e.parquet").write_bytes(b"not parquet")
    (tmp_path / "array.json").write_text('[\n{"user_id": 1}\n')
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "latin.csv").write_bytes(b"user_id,caf\xe9\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "semi.csv").write_text("user;item;stars;when\nu;a;1;2\n")
    (tmp_path / "timeless.csv").write_text("user_id,item_id,rating\nu,a,1\n")
    (tmp_path / "sound.csv").write_text("user_id,item_id,rating,timestamp\nu,a,1,2\n")
    for name, told in (
        ("", "table.interactions is not set"),
        ("twice.csv", r"'rating' \(table.rating\) is there twice"),
        ("e.xlsx", "the format is not known; known: .parquet, .csv"),
        ("e.parquet.gz", "the format is not known"),
        ("e.parquet", "not a Parquet file that can be read"),
        (
            "array.json",
            "'item_id' .* is not there; columns found: user_id; set table.item to the name that it has there",
        ),
        ("empty.csv", "columns found: none"),
        ("latin.csv", "not a header of column names in UTF-8"),
        ("folder", "no file matches table.interactions = 'folder'"),
        (
            "semi.csv",
            r"'user_id' \(table.user\) is not there; columns found: user, item, stars, when; set table.user",
        ),
        (
            "timeless.csv",
            r"'timestamp' \(table.timestamp\) .*, or to \"\" if there is none \(table.timestamp=\)",
        ),
    ):
        with pytest.raises(UserError, match=told):
            describe(str(tmp_path), TableSection(interactions=name))
    with pytest.raises(UserError, match=r"table\.attributes is set and table\.items is not"):
        describe(str(tmp_path), TableSection(interactions="twice.csv", attributes={"a": "b"}))
    with pytest.raises(UserError, match=r"table\.profile is set and table\.users is not"):
        describe(str(tmp_path), TableSection(interactions="twice.csv", profile=("age",)))
    with pytest.raises(UserError, match=r"table\.min_rating = 6 is above"):
        describe(str(tmp_path), TableSection(interactions="twice.csv", min_rating=6))
    plain = TableSection(interactions="semi.csv", delimiter=",")
    with pytest.raises(
        UserError, match=r"columns found: user;item;stars;when; .*several columns, set table\.delimiter"
    ):
        describe(str(tmp_path), plain)
    items = TableSection(
        interactions="sound.csv", items="sound.csv", title="", attributes={"genre": "genres"}
    )
    with pytest.raises(
        UserError, match=r"'genres' \(table\.attributes\.genre\) .* with table\.attributes=\{\}"
    ):
        describe(str(tmp_path), items)
    with pytest.raises(UserError, match=r"nowhere: there is no such folder; correct data\.raw_dir"):
        describe(str(tmp_path / "nowhere"), TableSection(interactions="e.csv"))
    with pytest.raises(UserError, match=rf"twice\.csv: is a file; give its folder, {tmp_path}$"):
        describe(str(tmp_path / "twice.csv"), TableSection(interactions="twice.csv"))
    with pytest.raises(UserError, match="cannot be opened"):
        describe("nosuch://bucket", TableSection(interactions="e.csv"))


def test_a_missing_column_is_told_with_what_to_set(tmp_path: Path):
    (tmp_path / "e.csv").write_bytes(CSV)
    (tmp_path / "i.csv").write_text(
        ",name,price\na,Lamp,3\nb,Chair,4\n"
    )  # as pandas writes an index without a name
    mapping = TableSection(interactions="e.csv", items="i.csv", title="name")
    with pytest.raises(UserError) as error:
        describe(str(tmp_path), mapping)
    assert str(error.value).startswith(
        f"{tmp_path}/i.csv: the column 'item_id' (table.item_id) is not there; columns found: \"\", name, price; if the column "
        'without a name is meant, set table.item_id=""'
    )
    (items,) = read(describe(str(tmp_path), mapping.model_copy(update={"item_id": ""})).items)
    assert items.table["raw_id"].to_pylist() == ["a", "b"]
    (tmp_path / "clicks.csv").write_text("user_id,item_id,timestamp\nu,a,100\n")
    with pytest.raises(
        UserError, match=r'; without ratings set table\.rating="" and data\.positive_rating=1'
    ):
        describe(str(tmp_path), TableSection(interactions="clicks.csv"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("u,a,4,2024-05-01 10:00:00", ', and "iso" would read \'2024-05-01 10:00:00\''),
        ("user_id='u', timestamp='2024-05-01T10:00:00.5Z'", ', and "iso" would read \'2024-05-01T10:00:00.5Z\''),
        ("u,a,4,25.03.2024 10:00", ", and '%d.%m.%Y %H:%M' would read '25.03.2024 10:00'"),
        ("u,a,4,3/5/2024", ", and '%m/%d/%Y' or '%d/%m/%Y' would read '3/5/2024'"),
        ("u,a,4,2024-05-01 1:02:03 PM", ", and '%Y-%m-%d %I:%M:%S %p' would read '2024-05-01 1:02:03 PM'"),
        ("u,a,4,soon", ""),
        ("u,a,4,1714557600000", ""),
        ("u,a,4,1969-12-31", ""),
    ],
)  # fmt: skip
def test_the_unit_that_reads_a_date_is_named(line: str, told: str):
    assert way_to_read_time(line) == told
    for unit in ["iso"] if "iso" in told else told.split("'")[1:-3:2]:
        text = told.split("'")[-2]
        column = Column("table.timestamp", "x", "time", "y", unit=unit)
        assert converted(pa.table({"x": [text]}), (column,))["y"].null_count == 0


# Fuzz: damaged lines among sound ones never harm the sound ones.

SOUND_CSV = [b'u%d,i%d,%g,%d,"a ""b"", c"' % (n % 7, n, n % 5 + 0.5, n) for n in range(200)]
SOUND_JSON = [
    b'{"user_id": "u%d", "item_id": "i%d", "rating": %g, "timestamp": %d, "tags": ["a", null], "x": {"y": "}"}}'
    % (n % 7, n, n % 5 + 0.5, n)
    for n in range(200)
]
PIECES = st.sampled_from(
    [b'"', b",", b"\t", b"\r", b"\x00", b"\xff\xfe", b"", b"NaN", b"null", b"1e999", b"9" * 40, b"{", b"}", b"[", b"]", b":",
     b"\n", b"\n\n", b"\r\n", b'""', b"{}", b"\xc3\xa9", b"\xed\xa0\x80", b"\\", b'\\"', b"'", b"}null{", b"\xef\xbb\xbf"]
)  # fmt: skip
EDITS = st.lists(
    st.tuples(
        st.integers(0, 199),  # line
        st.integers(0, 120),  # place in it
        st.integers(0, 12),  # bytes taken out there
        st.one_of(PIECES, st.binary(max_size=8)),  # put in
        st.booleans(),  # the line end is lost
    ),
    max_size=12,
)


def mangled(
    sound: list[bytes], edits: list[tuple[int, int, int, bytes, bool]]
) -> tuple[bytes, list[int], int]:
    """The block, the lines (by number in `sound`) that nothing touched, and how many lines there are now."""
    touched = dict.fromkeys(range(len(sound)), False)
    pieces = [line + b"\n" for line in sound]
    for line, place, taken, put, joined in edits:
        body = pieces[line].removesuffix(b"\n")
        body = body[:place] + put + body[place + taken :]
        pieces[line] = body if joined else body + b"\n"
        touched[line] = True
        if joined:  # the next line becomes part of this one
            touched[min(line + 1, len(sound) - 1)] = True
    block = b"".join(pieces)
    plain = block.replace(b"\r\n", b"\n")
    num_lines = plain.count(b"\n") + (not plain.endswith(b"\n") if plain else 0)
    return block, [line for line, hit in touched.items() if not hit], num_lines


def check_fuzzed(
    parse: Callable[[bytes], Parsed], block: bytes, untouched: list[int], num_lines: int
) -> None:
    parsed = parse(block)
    assert parsed.rows_read == num_lines
    assert parsed.rows_read == parsed.table.num_rows + parsed.quarantined.counts.total()
    assert parsed.table.schema == EVENTS
    parsed.table.validate(full=True)
    rows = parsed.table.to_pylist()
    found = {(row["user"], row["item"], row["rating"], row["timestamp_s"]) for row in rows}
    for n in untouched:
        assert (f"u{n % 7}", f"i{n}", n % 5 + 0.5, n) in found
    split = block.replace(b"\r\n", b"\n").removesuffix(b"\n").split(b"\n")
    for bad in parsed.quarantined.shown:
        assert split[bad.row].decode("utf-8", "backslashreplace")[:200] == bad.text
    assert parsed.row_of is not None or not rows
    if rows:
        assert np.all(np.diff(parsed.row_of) > 0)
        for row, place in zip(rows, parsed.row_of, strict=True):
            assert row["item"].encode() in split[place] or b'"' in split[place] or b"\\" in split[place]


@FUZZ
@given(edits=EDITS)
def test_fuzz_csv(edits: list[tuple[int, int, int, bytes, bool]]):
    folder = fsspec.filesystem("memory")
    folder.pipe("/fuzz_table/e.csv", b"user_id,item_id,rating,timestamp,note\n")
    parse = describe("memory://fuzz_table", TableSection(interactions="e.csv")).events[0].parse
    assert parse is not None
    check_fuzzed(parse, *mangled(SOUND_CSV, edits))


@FUZZ
@given(edits=EDITS)
def test_fuzz_jsonl(edits: list[tuple[int, int, int, bytes, bool]]):
    folder = fsspec.filesystem("memory")
    folder.pipe("/fuzz_table/e.jsonl", SOUND_JSON[0] + b"\n")
    parse = describe("memory://fuzz_table", TableSection(interactions="e.jsonl")).events[0].parse
    assert parse is not None
    check_fuzzed(parse, *mangled(SOUND_JSON, edits))


@FUZZ
@given(block=st.binary(max_size=300), form=st.sampled_from(["e.csv", "e.jsonl", "i.csv", "i.jsonl", "u.csv"]))
def test_fuzz_anything_at_all(block: bytes, form: str):
    folder = fsspec.filesystem("memory")
    folder.pipe("/fuzz_any/e.csv", b"user_id,item_id,rating,timestamp,title,tags\n")
    folder.pipe("/fuzz_any/u.csv", b"user_id\n")
    folder.pipe(
        "/fuzz_any/e.jsonl", b'{"user_id":1,"item_id":1,"rating":1,"timestamp":1,"title":"","tags":[""]}\n'
    )
    for name in ("csv", "jsonl"):
        folder.copy(f"/fuzz_any/e.{name}", f"/fuzz_any/i.{name}")
    mapping = TableSection(interactions="e.csv", attributes={"tag": "tags"}, items="i.csv", users="u.csv")
    key = {"e": "interactions", "i": "items", "u": "users"}[form[0]]
    source = describe("memory://fuzz_any", mapping.model_copy(update={key: form}))
    ((file,), schema) = {
        "e": (source.events, EVENTS),
        "i": (source.items, ITEMS),
        "u": (source.users, USERS),
    }[form[0]]
    assert file.parse is not None
    parsed = file.parse(block)
    assert parsed.rows_read == parsed.table.num_rows + parsed.quarantined.counts.total()
    assert parsed.table.schema == schema
    parsed.table.validate(full=True)


def broken_text(values: list[bytes | None]) -> pa.Array:
    """Text as a careless writer leaves it: any bytes."""
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), raw.null_count)


CELLS = st.one_of(
    st.none(),
    st.binary(max_size=6),
    st.sampled_from([b"4", b" 4.5", b"nan", b"-inf", b"2024-05-01", b"9" * 30]),
)
FLOATS = st.one_of(st.none(), st.floats(width=64))
SIZE = 130  # more than lines.LEAF, so that halving takes part
COLUMNS = st.one_of(
    st.lists(CELLS, min_size=SIZE, max_size=SIZE).map(broken_text),
    st.lists(FLOATS, min_size=SIZE, max_size=SIZE).map(lambda values: pa.array(values, pa.float64())),
    st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), min_size=SIZE, max_size=SIZE).map(
        lambda values: pa.array(values, pa.int64())
    ),
)
TIMES = st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), min_size=SIZE, max_size=SIZE).map(
    lambda values: pa.array(values, pa.timestamp("ns"))
)


@settings(max_examples=60, deadline=None)
@given(
    user=COLUMNS, rating=COLUMNS, timestamp=st.one_of(COLUMNS, TIMES), unit=st.sampled_from(["s", "us", "iso"]),
    good=st.lists(st.integers(0, SIZE - 1), max_size=5),
)  # fmt: skip
def test_fuzz_parquet_columns(
    user: pa.Array, rating: pa.Array, timestamp: pa.Array, unit: str, good: list[int]
):
    columns = (
        Column("table.user", "user_id", "id", "user"),
        Column("table.item", "item_id", "id", "item"),
        Column("table.rating", "rating", "number", "rating"),
        Column("table.timestamp", "timestamp", "time", "timestamp_s", unit=unit),  # type: ignore[arg-type]
    )
    if unit == "iso" and not (pa.types.is_string(timestamp.type) or pa.types.is_timestamp(timestamp.type)):
        timestamp = timestamp.cast(pa.string())  # describe refuses numbers there
    table = pa.table({"user_id": user, "item_id": range(SIZE), "rating": rating, "timestamp": timestamp})
    sound = {
        "user_id": [b"me" if pa.types.is_string(user.type) else 7], "item_id": [1000],
        "rating": [b"3" if pa.types.is_string(rating.type) else 3],
        "timestamp": [b"2024-05-01" if unit == "iso" else b"100" if pa.types.is_string(timestamp.type) else 100],
    }  # fmt: skip
    if pa.types.is_timestamp(timestamp.type):
        sound["timestamp"] = [MORNING_S * 10**9]
    one = pa.table({name: pa.array(cell).cast(table.schema.field(name).type) for name, cell in sound.items()})
    parts = [table]
    for place in sorted(good):  # sound rows among the random ones
        parts = [*parts[:-1], parts[-1].slice(0, place // 2), one, parts[-1].slice(place // 2)]
    table = pa.concat_tables(parts)
    parse = parquet_parse(columns)
    parsed = parse(table)
    assert parsed.rows_read == table.num_rows == parsed.table.num_rows + parsed.quarantined.counts.total()
    assert parsed.table.schema == EVENTS
    parsed.table.validate(full=True)
    kept = parsed.table["item"].to_pylist()
    assert kept.count("1000") == len(good)
    items = [str(item) for item in table["item_id"].to_pylist()]
    rows = parsed.row_of.tolist() if parsed.row_of is not None else []
    assert kept == [items[row] for row in rows] and rows == sorted(rows)


def parquet_parse(columns: tuple[Column, ...]) -> Callable[[pa.Table], Parsed]:
    memory = fsspec.filesystem("memory")
    with memory.open("/fuzz_parquet/e.parquet", "wb") as sink:
        pq.write_table(pa.table({"user_id": ["u"], "item_id": [1], "rating": [1.0], "timestamp": [1]}), sink)
    parse = describe("memory://fuzz_parquet", TableSection(interactions="e.parquet")).events[0].parse
    assert isinstance(parse, partial)
    return partial(parse.func, **{**parse.keywords, "columns": columns})


def test_real_amazon_files_as_a_team_would_map_them():
    folder = DATA / "amazon-gift-cards"
    if not folder.exists():
        pytest.skip("shared/data is not here")
    mapping = TableSection(
        interactions="Gift_Cards_5.json.gz", user="reviewerID", item="asin", rating="overall",
        timestamp="unixReviewTime", items="meta_*.json.gz", item_id="asin", attributes={"brand": "brand"},
    )  # fmt: skip
    source = describe(str(folder), mapping)
    (events,), (items,) = read(source.events), read(source.items)
    text = gzip.decompress((folder / "Gift_Cards_5.json.gz").read_bytes())
    lines = [json.loads(line) for line in text.splitlines()]
    assert events.table.num_rows == len(lines) == 2972 and items.table.num_rows == 1547
    assert events.table.to_pylist() == [
        {"user": row["reviewerID"], "item": row["asin"], "rating": row["overall"], "timestamp_s": row["unixReviewTime"]}
        for row in lines
    ]  # fmt: skip
    assert not events.quarantined.counts and not items.quarantined.counts
