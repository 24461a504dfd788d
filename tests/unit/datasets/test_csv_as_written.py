"""CSV as people have it: whatever wrote the file, the rows are the same, and damage costs its own line only."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_ray.config import Config, default_config
from dpo4rec_ray.config.data import TableSection
from dpo4rec_ray.datasets import files
from dpo4rec_ray.datasets.csv_rows import RowJoiner
from dpo4rec_ray.datasets.parsing import BAD_NUMBER, EMPTY_LINE, OPEN_QUOTE, OUT_OF_RANGE, WRONG_ENCODING
from dpo4rec_ray.datasets.source import DataFile, Parsed
from dpo4rec_ray.datasets.table import describe
from dpo4rec_ray.errors import UserError

HEADER = ["item_id", "title", "tags"]
ITEMS = [["7", 'Lamp, "tall"', "red|blue"], ["8", "Bärs café €", ""], ["9", "Plain", "green"]]
ATTRIBUTES = {"tag": "tags"}


def blocks(described: tuple[DataFile, ...], split_bytes: int, block_bytes: int) -> list[tuple[int, Parsed]]:
    """(order, what the parser makes of it) of every block; read again where rows turn out to span lines, as a stage does."""
    found: list[tuple[int, Parsed]] = []
    for split in files.plan_splits(described, split_bytes):
        file = described[split.file]
        assert file.parse is not None
        parse: Callable[..., Parsed] = pickle.loads(pickle.dumps(file.parse))
        found += [
            (block.order, parse(block.content)) for block in files.read_blocks(split, file, block_bytes)
        ]
    if any(parsed.spans_lines for _, parsed in found):
        return blocks(tuple(file.over_lines or file for file in described), split_bytes, block_bytes)
    return found


def items_of(
    folder: Path, content: bytes, name: str = "i.csv", split_bytes: int = 2**20, **settings: Any
) -> tuple[list[list[Any]], list[tuple[int, str]]]:
    """Rows (id, title, tags) and (line of the file, reason) of the bad ones, of a file of items."""
    (folder / name).write_bytes(content)
    delimiter = settings.get("delimiter", ",")
    (folder / "e.csv").write_text(delimiter.join(["user_id", "item_id", "rating", "timestamp"]) + "\n")
    section = TableSection(interactions="e.csv", items=name, attributes=ATTRIBUTES, **settings)
    rows, bad, line = [], [], 2 if not settings.get("item_columns") else 1
    for _, parsed in blocks(describe(str(folder), section).items, split_bytes, max(50, split_bytes)):
        rows += [
            [row["raw_id"], row["title"], "|".join(tag.removeprefix("tag: ") for tag in row["attributes"])]
            for row in parsed.table.to_pylist()
        ]
        bad += [(line + one.row, one.reason) for one in parsed.quarantined.shown]
        line += parsed.rows_read if parsed.num_lines is None else parsed.num_lines
    return rows, bad


def written(rows: list[list[str]], encoding: str = "utf-8", **dialect: Any) -> bytes:
    out = io.StringIO()
    csv.writer(out, **{"lineterminator": "\n", **dialect}).writerows(rows)
    return out.getvalue().encode(encoding)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_delimiters_and_line_ends_are_found_out(tmp_path: Path, delimiter: str, line_end: str):
    content = written(
        [HEADER, *ITEMS], delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_NONNUMERIC
    )
    assert items_of(tmp_path, content) == (ITEMS, [])
    assert items_of(tmp_path, content, delimiter=delimiter) == (ITEMS, [])
    (file,) = describe(str(tmp_path), TableSection(interactions="e.csv", items="i.csv")).items
    assert ("fields are separated by" in file.note) == (delimiter != ",")
    assert ("carriage returns" in file.note) == (line_end == "\r")


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""), ("utf-8", codecs.BOM_UTF8), ("utf-16", b""), ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE), ("utf-16-le", b""), ("utf-16-be", b""), ("utf-32", b""),
    ],
)  # fmt: skip
def test_unicode_is_found_out(tmp_path: Path, encoding: str, mark: bytes):
    content = mark + written([HEADER, *ITEMS], encoding)
    assert items_of(tmp_path, content, split_bytes=50) == (ITEMS, [])
    (tmp_path / "x").mkdir()
    assert items_of(tmp_path / "x", gzip.compress(content), "i.csv.gz") == (ITEMS, [])


@pytest.mark.parametrize("encoding", ["cp1252", "iso-8859-15", "latin-1", "gbk", "shift-jis", "cp1251"])
def test_other_encodings_are_set_and_never_guessed(tmp_path: Path, encoding: str):
    words = {"gbk": "台灯", "shift-jis": "ランプ", "cp1251": "лампа", "latin-1": "Lampé n° 0"}
    rows = [["7", words.get(encoding, "café €"), "é" if encoding == "latin-1" else "x"]] * 3
    content = written([HEADER, *rows], encoding, delimiter=";")
    assert items_of(tmp_path, content, encoding=encoding, split_bytes=20) == (rows, [])
    with pytest.raises(UserError, match=r"is not in UTF-8; set table\.encoding, such as \"cp1252\""):
        items_of(tmp_path, content)


def test_a_byte_that_is_not_in_the_encoding_costs_its_line(tmp_path: Path):
    rows = [["7", "caf\xe9", "x"], ["8", "t\x81", "y"], ["9", "z", "é"]]
    content = written([HEADER, *rows], "latin-1")
    assert items_of(tmp_path, content, encoding="cp1252") == ([rows[0], rows[2]], [(3, WRONG_ENCODING)])
    # an odd byte at the end of UTF-16
    content = written([HEADER, *ITEMS], "utf-16-le") + b"x"
    rows, bad = items_of(tmp_path, content)
    assert rows == ITEMS and bad == [(5, WRONG_ENCODING)]


@pytest.mark.parametrize("split_bytes", [1, 7, 16, 64, 2**20])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_over_several_lines_wherever_the_file_is_cut(
    tmp_path: Path, split_bytes: int, line_end: str, packed: bool
):
    titles = ['a, "b"\nc', "one", "two\n\nthree\n", "four", "\n", 'five"\n"six']
    rows = [[str(n), title, "t"] for n, title in enumerate(titles)]
    content = written([HEADER, *rows], quoting=csv.QUOTE_ALL).replace(b"\n", line_end.encode())
    content += b'bad,line\n"7","last\nrow","t"'
    found, bad = items_of(
        tmp_path,
        gzip.compress(content) if packed else content,
        "i.csv.gz" if packed else "i.csv",
        split_bytes=split_bytes,
    )
    wanted = [[id_, " ".join(title.split()), tag] for id_, title, tag in rows] + [["7", "last row", "t"]]
    assert found == wanted
    # Six rows of 1 + 5 line breaks each beyond the first lines; the header is line 1.
    assert bad == [(2 + 6 + sum(title.count("\n") for title in titles), "wrong field count")]


def test_rows_over_lines_with_escapes_and_as_excel_writes_them(tmp_path: Path):
    """Excel ends rows with \\r\\n, and lines within a cell with \\n."""
    content = b'item_id,title,tags\r\n7,"a\nb",t\r\n8,c,t\r\n'
    assert items_of(tmp_path, content) == ([["7", "a b", "t"], ["8", "c", "t"]], [])
    content = rb"""item_id,title,tags
7,"say \"hi\"
and \\",t
8,"a \" b",t
"""
    assert items_of(tmp_path, content, escape="\\") == (
        [["7", 'say "hi" and \\', "t"], ["8", 'a " b', "t"]],
        [],
    )


def test_a_carriage_return_within_quotes_is_a_line_break_too(tmp_path: Path):
    rows = [[str(n), f"Title\r{n}" if n % 7 == 0 else f"Title {n}", "t"] for n in range(200)]
    content = written([HEADER, *rows], quoting=csv.QUOTE_ALL) + b"8,c\rd,t\n" + b'9,"e\rf"\n'
    found, bad = items_of(tmp_path, content, split_bytes=500)
    assert found == [[id_, title.replace("\r", " "), tag] for id_, title, tag in rows]
    assert bad == [(202, "unreadable"), (203, "wrong field count")]


def test_a_row_over_lines_far_behind_the_sample_is_found_while_reading(tmp_path: Path):
    rows = [[str(n), f"Title number {n}", "t"] for n in range(5000)]
    rows[4000][1] = "first line\nsecond line"
    content = written([HEADER, *rows]) + b"x\n"
    assert content.index(b"second line") > files.HEAD_BYTES
    (tmp_path / "i.csv").write_bytes(content)
    source = describe(str(tmp_path), TableSection(interactions="i.csv", user="title", item="tags", rating="",
                                                  timestamp="", items="i.csv", attributes=ATTRIBUTES))  # fmt: skip
    assert source.items[0].join is None and source.items[0].over_lines is not None
    assert len(files.plan_splits(source.items, 2**15)) > 3
    rows[4000][1] = "first line second line"
    found, bad = items_of(tmp_path, content, split_bytes=2**15)
    assert sorted(found) == sorted(rows) and bad == [(5003, "wrong field count")]


def test_an_unclosed_quote_costs_its_line_and_swallows_none(tmp_path: Path):
    sound = [[str(n), f"A {n}", "t"] for n in range(50)]
    lines = written([HEADER, *sound]).split(b"\n")
    lines[10] = b'9,"no end,t'
    for more in ([], [b'60,"two\nlines",t']):  # also in a file that has rows over lines
        found, bad = items_of(tmp_path, b"\n".join([*lines[:-1], *more, b""]))
        assert found[:49] == sound[:9] + sound[10:] and len(found) == 49 + len(more)
        assert bad == [(11, OPEN_QUOTE)]


def test_a_quote_that_is_closed_by_another_rows_quote_joins_nothing(tmp_path: Path):
    """What lies between two stray quotes has not the header's number of fields."""
    content = b'item_id,title,tags\n1,a,"t\n2,b,t\n3,c",t\n4,"d\ne",t\n'
    found, bad = items_of(tmp_path, content)
    assert found[-1] == ["4", "d e", "t"] and ["2", "b", "t"] in found
    assert bad[0] == (2, OPEN_QUOTE)


@pytest.mark.parametrize(
    ("content", "settings"),
    [
        (b"item_id,title,tags\n7,'Lamp, \"tall\"','red|blue'\n", {"quote": "'"}),
        (b'item_id,title,tags\n7,"Lamp, \\"tall\\"",red|blue\n', {"escape": "\\"}),
        (b'item_id\ttitle\ttags\n7\tLamp, "tall"\tred|blue\n', {"quote": "", "delimiter": "\t"}),
        (b'"item_id",title , tags\n7,"Lamp, ""tall""",red|blue\n', {}),
        (b'\xef\xbb\xbf"item_id","title","tags"\n7,"Lamp, ""tall""",red|blue\n', {}),
        (b'item_id,title,tags\n7,"Lamp, ""tall""",red|blue,\n', {}),  # a delimiter ends rows, not the header
        (b'item_id,title,tags,\n7,"Lamp, ""tall""",red|blue,\n', {}),
        (b'7,"Lamp, ""tall""",red|blue', {"item_columns": HEADER}),
        (b',item_id,title,tags\n0,7,"Lamp, ""tall""",red|blue\n', {}),  # the index that pandas writes
    ],
)
def test_ways_of_quoting_and_headers(tmp_path: Path, content: bytes, settings: dict[str, Any]):
    assert items_of(tmp_path, content, **settings) == (ITEMS[:1], [])


def test_a_padded_header_says_that_fields_are_padded_too(tmp_path: Path):
    content = b"item_id , title , tags\n 7 , Lamp , red\n"
    assert items_of(tmp_path, content) == ([["7", "Lamp", "red"]], [])


def test_empty_lines_and_lines_of_delimiters_are_no_damage(tmp_path: Path):
    content = b'item_id,title,tags\n\n7,Lamp,red\n,,\n   \n"",,\n8,Bed,\n,,\n'
    found, bad = items_of(tmp_path, content)
    assert found == [["7", "Lamp", "red"], ["8", "Bed", ""]]
    assert sorted(bad) == [(line, EMPTY_LINE) for line in (2, 4, 5, 6, 8)]


def events_of(folder: Path, ratings: list[str], **settings: Any) -> Parsed:
    rows = [[f"u{n}", f"i{n}", rating, "100"] for n, rating in enumerate(ratings)]
    content = written([["user_id", "item_id", "rating", "timestamp"], *rows], delimiter=";")
    (folder / "e.csv").write_bytes(content)
    ((_, parsed),) = blocks(
        describe(str(folder), TableSection(interactions="e.csv", **settings)).events, 2**20, 2**20
    )
    return parsed


@pytest.mark.parametrize(
    "form",
    [
        str.lower,
        str.title,
        str.upper,
        lambda text: text[0],
        lambda text: {"true": "yes", "false": "No"}[text],
        lambda text: {"true": "Y", "false": "n"}[text],
    ],
)
def test_truth_values_are_1_and_0_whatever_the_range(tmp_path: Path, form: Callable[[str], str]):
    parsed = events_of(tmp_path, [form("true"), form("false"), "3", "0"], min_rating=1)
    assert parsed.table["rating"].to_pylist() == [1.0, 0.0, 3.0]
    assert [bad.reason for bad in parsed.quarantined.shown] == [OUT_OF_RANGE]
    parsed = events_of(tmp_path, [form("true"), form("false"), "maybe"] * 100)  # read one by one
    assert parsed.table["rating"].to_pylist() == [1.0, 0.0] * 100
    assert parsed.quarantined.counts == {BAD_NUMBER: 100}


def test_decimal_commas(tmp_path: Path):
    cells = ["4,5", "4", ",5", "1.234,5", "-1,5", "4.5", "1,2,3", "x"]
    parsed = events_of(tmp_path, cells, decimal=",", max_rating=2000, min_rating=-2)
    assert parsed.table["rating"].to_pylist() == [4.5, 4.0, 0.5, 1234.5, -1.5]
    assert [(bad.row, bad.reason) for bad in parsed.quarantined.shown] == [
        (5, BAD_NUMBER), (6, BAD_NUMBER), (7, BAD_NUMBER)
    ]  # fmt: skip
    parsed = events_of(tmp_path, ["4,5", "4.5"])
    assert parsed.table["rating"].to_pylist() == [4.5] and parsed.quarantined.counts == {BAD_NUMBER: 1}


def test_times_in_any_format_and_no_times_at_all(tmp_path: Path):
    (tmp_path / "e.csv").write_text(
        "user_id,item_id,rating,when\nu,a,1,11/15/2019 9:55:12 AM\nu,b,1,tomorrow\n"
    )
    section = TableSection(interactions="e.csv", timestamp="when", timestamp_unit="%m/%d/%Y %I:%M:%S %p")
    ((_, parsed),) = blocks(describe(str(tmp_path), section).events, 2**20, 2**20)
    assert parsed.table["timestamp_s"].to_pylist() == [1_573_811_712]
    assert parsed.quarantined.counts == {"impossible timestamp": 1}
    section = TableSection(interactions="e.csv", timestamp="")
    ((_, parsed),) = blocks(describe(str(tmp_path), section).events, 2**20, 2**20)
    assert parsed.table["timestamp_s"].to_pylist() == [0, 0]


def test_several_items_in_a_cell_are_one_event_each(tmp_path: Path):
    (tmp_path / "e.tsv").write_text("u\tN1 N2  N3\t5\nv\t\t5\nw\tN1\t9\n")
    section = TableSection(
        interactions="e.tsv", interaction_columns=("who", "seen", "rating"), user="who", item="seen",
        item_separator=" ", timestamp="",
    )  # fmt: skip
    ((_, parsed),) = blocks(describe(str(tmp_path), section).events, 2**20, 2**20)
    rows = [(row["user"], row["item"]) for row in parsed.table.to_pylist()]
    assert rows == [("u", "N1"), ("u", "N2"), ("u", "N3")]
    assert parsed.row_of is not None and parsed.row_of.tolist() == [0, 0, 0]
    assert [(bad.row, bad.reason) for bad in parsed.quarantined.shown] == [(2, OUT_OF_RANGE)]
    assert (parsed.rows_read, parsed.num_lines) == (4, 3)


def test_mistakes_are_told_in_one_line(tmp_path: Path):
    (tmp_path / "e.csv").write_bytes(b'"a;b\n1;2\n')
    for keys, told in (
        ({}, r"first line is not a header of column names: '\"a;b'; see table.delimiter and table.quote"),
        ({"interaction_columns": ("a", "b", "c")}, "not the 3 columns that the recipe names"),
    ):
        with pytest.raises(UserError, match=told):
            describe(str(tmp_path), TableSection(interactions="e.csv", **keys))
    (tmp_path / "e.csv").write_bytes(b"u,i,3,100\n")
    with pytest.raises(
        UserError, match=r"if the first line is no header, name the columns in table\.interaction_columns"
    ):
        describe(str(tmp_path), TableSection(interactions="e.csv"))
    for values, told in (
        ({"delimiter": "::"}, "delimiter"),
        ({"encoding": "utf-9"}, "no such encoding"),
        ({"quote": "''"}, "quote"),
        ({"timestamp_unit": "minutes"}, "timestamp_unit"),
        ({"timestamp_unit": "minutes"}, "none of s, ms, us, ns, iso, and no format of strptime"),
    ):
        with pytest.raises(ValueError, match=told):
            TableSection.model_validate(values)
    with pytest.raises(UserError, match=r"the defaults: table\.timestamp_unit = 'minutes': none of s,"):
        default_config(["table.timestamp_unit=minutes"])
    assert Config.model_validate({"table": {"delimiter": "\\t"}}).table.delimiter == "\t"


ROWS = st.lists(
    st.tuples(
        st.text(st.characters(codec="utf-8", exclude_characters="\x1e\x00\r"), min_size=0, max_size=12),
        st.sampled_from(["", "x", "a,b", 'say "hi"', "two\nlines", "\n", '"', '"\n"', "end\n"]),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, cut=st.integers(1, 40), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_whatever_is_written_is_joined_into_as_many_lines(
    rows: list[tuple[str, str]], cut: int, quoting: Any
):
    """Python's writer, cut into pieces of whole lines anywhere: one line per row, and the same fields in it."""
    content = written([["id", *row] for row in rows], quoting=quoting)
    lines = content.splitlines(keepends=True) if b"\r" not in content else [content]
    lines = [line + b"\n" for line in content.removesuffix(b"\n").split(b"\n")]
    pieces = [b"".join(lines[low : low + cut]) for low in range(0, len(lines), cut)]
    joined = b"".join(RowJoiner(3, ",", '"', "")(iter(pieces))).decode()
    assert joined.count("\n") == len(rows)
    found = [next(csv.reader([line])) for line in joined.removesuffix("\n").split("\n")]
    assert [tuple(row[1:]) for row in found] == [tuple(x.replace("\n", "\x1e") for x in row) for row in rows]


def test_the_rows_of_a_table_keep_their_schema(tmp_path: Path):
    (tmp_path / "e.csv").write_text("user_id,item_id,rating,timestamp\n")
    source = describe(str(tmp_path), TableSection(interactions="e.csv"))
    assert source.events[0].parse is not None
    table = source.events[0].parse(b"\n").table
    assert table.schema.field("rating").type == pa.float32() and not table.num_rows
