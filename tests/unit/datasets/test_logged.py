"""Logged lists: sound ones come through as they are, each kind of damage is named, in Parquet as in JSON lines."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_ray.config.data import LoggedSection
from dpo4rec_ray.datasets import files
from dpo4rec_ray.datasets.logged import (
    BAD_HISTORY,
    BAD_LABEL,
    LENGTHS_DIFFER,
    REPEATED,
    UNKNOWN_SPLIT,
    WRONG_SIZE,
    describe,
)
from dpo4rec_ray.datasets.parsing import BAD_JSON, BAD_NUMBER, BAD_TIME, UNREADABLE
from dpo4rec_ray.datasets.source import LISTS, DataFile, Parsed
from dpo4rec_ray.errors import UserError

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
FULL = LoggedSection(
    user="user", candidates="shown", labels="clicks", timestamp="at", split="split", history="before",
    history_ratings="stars",
)  # fmt: skip
GOOD: dict[str, Any] = {
    "user": 7, "shown": [3, 1, 2], "clicks": [0, 1, 0.5], "at": 100, "split": "train", "before": [8, 9],
    "stars": [5.0, 3.5],
}  # fmt: skip
EXPECTED = {
    "user": "7", "timestamp_s": 100, "split": "train", "candidates": ["3", "1", "2"], "labels": [0.0, 1.0, 0.5],
    "history": ["8", "9"], "history_ratings": [5.0, 3.5],
}  # fmt: skip
TROUBLE: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"user": None}, "missing field user"),
    ({"shown": None}, "missing field candidates"),
    ({"clicks": None}, "missing field labels"),
    ({"shown": [3, None, 2]}, "missing field candidates"),
    ({"at": None}, "missing field timestamp"),
    ({"split": None}, "missing field split"),
    ({"clicks": [0, 1]}, LENGTHS_DIFFER),
    ({"shown": [], "clicks": []}, WRONG_SIZE),
    ({"shown": [1], "clicks": [1]}, WRONG_SIZE),
    ({"shown": [1, 2], "clicks": [1, 0]}, ""),
    ({"shown": list(range(200)), "clicks": [0] * 200}, ""),
    ({"shown": list(range(201)), "clicks": [0] * 201}, WRONG_SIZE),
    ({"clicks": [0, 1, None]}, BAD_LABEL),
    ({"clicks": [0, 1, -0.5]}, BAD_LABEL),
    ({"clicks": [0, 1, 1e300]}, BAD_LABEL),
    ({"split": "validation"}, UNKNOWN_SPLIT),
    ({"split": "valid"}, ""),
    ({"split": "test"}, ""),
    ({"at": -1}, BAD_TIME),
    ({"at": 4_102_444_800}, BAD_TIME),
    ({"before": [8]}, BAD_HISTORY),
    ({"before": [8, None]}, BAD_HISTORY),
    ({"stars": [5.0, None]}, BAD_HISTORY),
    ({"stars": None}, BAD_HISTORY),
    ({"before": [], "stars": []}, ""),
    ({"before": None, "stars": None}, ""),
    ({}, ""),
]


def read(described: tuple[DataFile, ...]) -> Parsed:
    """The only block of the only file."""
    (split,) = files.plan_splits(described)
    (file,) = described
    parse: Callable[..., Parsed] = pickle.loads(pickle.dumps(file.parse))
    if file.kind == "parquet":
        parsed = parse(files.read_row_group(split, file.columns))
    else:
        (block,) = files.read_blocks(split, file)
        parsed = parse(block.content)
    check(parsed)
    return parsed


def check(parsed: Parsed) -> None:
    assert parsed.rows_read == parsed.table.num_rows + parsed.quarantined.counts.total()
    assert parsed.table.schema == LISTS
    parsed.table.validate(full=True)
    assert parsed.row_of is not None and len(parsed.row_of) == parsed.table.num_rows


def bad_rows(parsed: Parsed) -> list[tuple[int, str]]:
    return sorted((bad.row, bad.reason) for bad in parsed.quarantined.shown)


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("name", ["l.parquet", "l.jsonl", "l.jsonl.gz"])
def test_each_kind_of_damage_is_named_and_the_rest_comes_through(tmp_path: Path, name: str):
    rows = [{**GOOD, **change} for change, _ in TROUBLE]
    if name == "l.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        content = jsonl(rows)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    parsed = read(describe(f"{tmp_path}/{name}", FULL))
    assert bad_rows(parsed) == [(row, reason) for row, (_, reason) in enumerate(TROUBLE) if reason]
    good = [row for row, (_, reason) in enumerate(TROUBLE) if not reason]
    assert parsed.row_of is not None and parsed.row_of.tolist() == good
    lists = parsed.table.to_pylist()
    assert lists[0] == lists[-1] == EXPECTED
    assert lists[1] == {**EXPECTED, "candidates": ["1", "2"], "labels": [1.0, 0.0]}
    assert [row["split"] for row in lists[3:5]] == ["valid", "test"]
    assert lists[5] == {**EXPECTED, "history": [], "history_ratings": []}
    assert lists[6] == {**EXPECTED, "history": None, "history_ratings": None}
    shown = {bad.row: bad.text for bad in parsed.quarantined.shown}[9]
    assert shown == (
        "user=7, shown=[1], clicks=[1.0], at=100, split='train', before=[8, 9], stars=[5.0, 3.5]"
        if name == "l.parquet"
        else json.dumps(rows[9])
    )


# behaviors.tsv of MIND, and what may be wrong with a line of it.
MIND = [
    ("1\tU1\t11/15/2019 9:55:12 AM\tN8 N9\tN1-0 N2-1 N3-0", ""),
    ("2\tU2\t11/15/2019 12:05:00 PM\t\tN1-1  N-2-0 ", ""),  # no history; an id with the separator in it
    ("3\tU1\t11/15/2019 9:55:12 AM\tN8\tN1 N2", BAD_LABEL),  # the test set has no labels
    ("4\tU1\t11/15/2019 9:55:12 AM\tN8\tN1-yes N2-1", BAD_LABEL),
    ("5\tU1\t11/15/2019 9:55:12 AM\tN8\tN1-1", WRONG_SIZE),
    ("6\tU1\t2019-11-15\tN8\tN1-1 N2-0", BAD_TIME),
    ("7\t\t11/15/2019 9:55:12 AM\tN8\tN1-1 N2-0", "missing field user"),
    ('8\tU1\t11/15/2019 9:55:12 AM\t"N8\tN1-1 N2-0', ""),  # nothing is quoted
]
MIND_SECTION = {
    "columns": ("impression", "user", "time", "history", "shown"), "user": "user", "candidates": "shown",
    "separator": " ", "label_separator": "-", "history": "history", "timestamp": "time",
    "timestamp_unit": "%m/%d/%Y %I:%M:%S %p", "quote": "",
}  # fmt: skip


def test_impressions_of_mind(tmp_path: Path):
    (tmp_path / "behaviors.tsv").write_text("\n".join(line for line, _ in MIND))
    parsed = read(describe(f"{tmp_path}/behaviors.tsv", LoggedSection.model_validate(MIND_SECTION)))
    assert bad_rows(parsed) == [(row, reason) for row, (_, reason) in enumerate(MIND) if reason]
    first, second, third = parsed.table.to_pylist()
    assert first == {
        "user": "U1", "timestamp_s": 1_573_811_712, "split": None, "candidates": ["N1", "N2", "N3"],
        "labels": [0.0, 1.0, 0.0], "history": ["N8", "N9"], "history_ratings": None,
    }  # fmt: skip
    assert (second["candidates"], second["labels"], second["history"]) == (["N1", "N-2"], [1.0, 0.0], None)
    assert second["timestamp_s"] - first["timestamp_s"] == 7788 and third["history"] == ['"N8']


@pytest.mark.parametrize("name", ["l.csv", "l.parquet", "l.jsonl"])
def test_lists_as_text_in_every_format(tmp_path: Path, name: str):
    """Candidates, labels, histories and ratings, each in a cell; labels with decimal commas and truth values."""
    rows = [
        {"user": "u", "shown": "a;b;c", "clicks": "1;0,5;false", "before": "x;y", "stars": "4,5;3"},
        {"user": "u", "shown": "a;b", "clicks": "1;x", "before": "", "stars": ""},
        {"user": "u", "shown": "a;b", "clicks": "1", "before": "x", "stars": "1"},
    ]
    if name == "l.csv":
        cells = [",".join(f'"{value}"' for value in row.values()) for row in rows]
        (tmp_path / name).write_text("\n".join([",".join(rows[0]), *cells]))
    elif name == "l.jsonl":
        (tmp_path / name).write_bytes(jsonl(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    section = LoggedSection(
        user="user", candidates="shown", labels="clicks", history="before", history_ratings="stars",
        separator=";", decimal=",",
    )  # fmt: skip
    parsed = read(describe(f"{tmp_path}/{name}", section))
    (row,) = parsed.table.to_pylist()
    assert (row["candidates"], row["labels"]) == (["a", "b", "c"], [1.0, 0.5, 0.0])
    assert (row["history"], row["history_ratings"]) == (["x", "y"], [4.5, 3.0])
    assert bad_rows(parsed) == [(1, BAD_NUMBER), (2, LENGTHS_DIFFER)]


@pytest.mark.parametrize(
    ("shown", "clicks", "separator"),
    [
        ("['a', 'b']", "[1, 0]", ","),  # a column of lists, as pandas writes it
        ('["a","b"]', "[1.0,0.0]", ","),
        ("[a b]", "[1 0]", " "),  # an array, as numpy writes it
        ("a|b", "1|0", "|"),
        ("a, b,", "1, 0,", ","),
        ("a b", "true false", " "),
    ],
)
def test_ways_to_write_a_list_as_text(tmp_path: Path, shown: str, clicks: str, separator: str):
    pq.write_table(pa.table({"user": ["u"], "shown": [shown], "clicks": [clicks]}), tmp_path / "l.parquet")
    section = LoggedSection(user="user", candidates="shown", labels="clicks", separator=separator)
    (row,) = read(describe(f"{tmp_path}/l.parquet", section)).table.to_pylist()
    assert (row["candidates"], row["labels"]) == (["a", "b"], [1.0, 0.0])


def test_text_without_a_separator_is_told(tmp_path: Path):
    (tmp_path / "l.csv").write_text("user_id,candidate_item_ids,labels\nu,a b,1 0\n")
    with pytest.raises(UserError, match=r"logged\.candidates\) .*lists of .*or set the separator of lists"):
        describe(f"{tmp_path}/l.csv", LoggedSection())
    with pytest.raises(UserError, match=r"set logged\.label_separator"):
        describe(f"{tmp_path}/l.csv", LoggedSection(labels=""))


def test_columns_that_are_not_named_are_null(tmp_path: Path):
    pq.write_table(pa.Table.from_pylist([GOOD]), tmp_path / "l.parquet")
    path = f"{tmp_path}/l.parquet"
    few = LoggedSection(user="user", candidates="shown", labels="clicks")
    unknown = {"timestamp_s": None, "split": None, "history": None, "history_ratings": None}
    assert read(describe(path, few)).table.to_pylist() == [{**EXPECTED, **unknown}]
    with_history = few.model_copy(update={"history": "before"})
    assert read(describe(path, with_history)).table.to_pylist() == [
        {**EXPECTED, **unknown, "history": ["8", "9"]}
    ]


def test_a_repeated_candidate_is_told_and_kept(tmp_path: Path):
    rows = [
        {**GOOD, "shown": [1, 2, 1]},
        GOOD,
        {**GOOD, "shown": [5, 5, 5]},
        {**GOOD, "shown": [4, 4], "clicks": [0]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "l.parquet")
    parsed = read(describe(f"{tmp_path}/l.parquet", FULL))
    assert parsed.cleaned == {REPEATED: 2} and bad_rows(parsed) == [(3, LENGTHS_DIFFER)]
    assert parsed.table["candidates"].to_pylist() == [["1", "2", "1"], ["3", "1", "2"], ["5", "5", "5"]]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int32()),
        pa.large_list(pa.large_string()),
        pa.list_(pa.string(), 3),
        pa.list_(pa.float64()),
    ],
)
def test_parquet_list_types_dictionaries_and_times(kind: pa.DataType):
    memory = fsspec.filesystem("memory")
    table = pa.table(
        {
            "user": pa.array(["7", "7"]).dictionary_encode(),
            "shown": pa.array([[3, 1, 2], [3, 1, 2]], pa.list_(pa.int64()))
            .cast(pa.list_(kind.value_type))
            .cast(kind),
            "clicks": pa.array([[False, True, False], [True, False, False]]),
            "at": pa.array([datetime(2024, 5, 1, 10)] * 2, pa.timestamp("ns")),
        }
    )
    with memory.open("/logged_types/l.parquet", "wb") as sink:
        pq.write_table(table, sink)
    mapping = LoggedSection(
        user="user", candidates="shown", labels="clicks", timestamp="at", timestamp_unit="iso"
    )
    lists = read(describe("memory://logged_types/l.parquet", mapping)).table.to_pylist()
    assert [row["candidates"] for row in lists] == [["3", "1", "2"]] * 2
    assert [row["labels"] for row in lists] == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert [(row["user"], row["timestamp_s"]) for row in lists] == [("7", 1_714_557_600)] * 2


def test_elements_that_cannot_be_read(tmp_path: Path):
    raw = pa.array([b"a", b"\xff", b"c", b"d"])
    texts = pa.Array.from_buffers(pa.string(), 4, raw.buffers())  # the second is not UTF-8
    offsets = pa.array([0, 2, 4], pa.int32())
    table = pa.table({
        "user": ["u1", "u2"],
        "shown": pa.ListArray.from_arrays(offsets, texts),
        "clicks": [["1", "0"], ["1", "nope"]],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "l.parquet")
    few = LoggedSection(user="user", candidates="shown", labels="clicks")
    parsed = read(describe(f"{tmp_path}/l.parquet", few))
    assert bad_rows(parsed) == [(0, UNREADABLE), (1, BAD_NUMBER)]
    (tmp_path / "l.jsonl").write_bytes(
        jsonl([
            {"user": "u", "shown": ["a", "b"], "clicks": [1, 0]},
            {"user": 5, "shown": [1, "b"], "clicks": ["1", 0.5]},  # other types, still one meaning
            {"user": "u", "shown": "ab", "clicks": [1, 0]},
            {"user": "u", "shown": ["a", ["b"]], "clicks": [1, 0]},
            {"user": "u", "shown": ["a", "b"], "clicks": [1, "no"]},
        ])
        + b"damaged\n"
    )  # fmt: skip
    parsed = read(describe(f"{tmp_path}/l.jsonl", few))
    assert bad_rows(parsed) == [(2, UNREADABLE), (3, UNREADABLE), (4, BAD_NUMBER), (5, BAD_JSON)]
    assert parsed.table["candidates"].to_pylist() == [["a", "b"], ["1", "b"]]
    assert parsed.table["labels"].to_pylist() == [[1.0, 0.0], [1.0, 0.5]]


def test_patterns_uris_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.Table.from_pylist([GOOD]), tmp_path / name)
    pattern = f"{tmp_path.as_uri()}/*.parquet"
    assert [file.path[-9:] for file in describe(pattern, FULL)] == ["a.parquet", "b.parquet"]
    monkeypatch.chdir(tmp_path)
    assert read(describe("a.parquet", FULL)).table.to_pylist() == [EXPECTED]


def test_a_wrong_mapping_is_told_before_anything_is_read(tmp_path: Path):
    pq.write_table(pa.Table.from_pylist([GOOD]), tmp_path / "l.parquet")
    (tmp_path / "l.csv").write_text("user,shown,clicks\nu,1,2\n")
    path = f"{tmp_path}/l.parquet"
    for key in ("user", "candidates", "labels", "timestamp", "split", "history", "history_ratings"):
        with pytest.raises(
            UserError, match=rf"'no' \(logged\.{key}\) is not there; columns found: user, shown"
        ):
            describe(path, FULL.model_copy(update={key: "no"}))
    with pytest.raises(
        UserError, match=r"'user' \(logged\.labels\) is of type int64; it must hold lists of numbers"
    ):
        describe(path, FULL.model_copy(update={"labels": "user"}))
    with pytest.raises(
        UserError, match=r"'split' \(logged\.candidates\) is of type string; it must hold lists"
    ):
        describe(path, FULL.model_copy(update={"candidates": "split"}))
    with pytest.raises(
        UserError, match=r"'shown' \(logged\.candidates\) is of type string; it must hold lists"
    ):
        describe(f"{tmp_path}/l.csv", LoggedSection(user="user", candidates="shown", labels="clicks"))
    with pytest.raises(UserError, match=r"logged\.history is not set"):
        describe(path, FULL.model_copy(update={"history": ""}))
    with pytest.raises(UserError, match=r"no file matches logged\.file = 'none\.parquet'"):
        describe(f"{tmp_path}/none.parquet", FULL)


SOUND = [{**GOOD, "user": f"u{n}", "shown": [n, n + 1, n + 2]} for n in range(100)]
PIECES = st.sampled_from(
    [
        b'"',
        b",",
        b"\x00",
        b"\xff",
        b"",
        b"NaN",
        b"null",
        b"[",
        b"]",
        b"{",
        b"}",
        b"\n",
        b"\r",
        b"1e999",
        b"-1",
    ]
)


@settings(max_examples=100, deadline=None)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, 99),
            st.integers(0, 140),
            st.integers(0, 9),
            st.one_of(PIECES, st.binary(max_size=6)),
        ),
        max_size=8,
    )
)
def test_fuzz_jsonl(edits: list[tuple[int, int, int, bytes]]):
    pieces = [json.dumps(row).encode() + b"\n" for row in SOUND]
    memory = fsspec.filesystem("memory")
    memory.pipe("/fuzz_logged/l.jsonl", pieces[0])
    parse = describe("memory://fuzz_logged/l.jsonl", FULL)[0].parse
    assert parse is not None
    for line, place, taken, put in edits:
        pieces[line] = pieces[line][:place] + put + pieces[line][place + taken :]
    lost = {line for line, *_ in edits} | {
        line + 1 for line, *_ in edits
    }  # an edit may take the line end too
    parsed = parse(b"".join(pieces))
    check(parsed)
    found = parsed.table.to_pylist()  # an edited line may name another line's user
    for n in set(range(100)) - lost:
        shown = [str(n), str(n + 1), str(n + 2)]
        assert {**EXPECTED, "user": f"u{n}", "candidates": shown} in found


CELLS = {
    "user": st.one_of(st.none(), st.text(max_size=3)),
    "shown": st.one_of(st.none(), st.lists(st.one_of(st.none(), st.sampled_from("abcd"), st.text(max_size=2)), max_size=5)),
    "clicks": st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(0, 1), st.floats()), max_size=5)),
    "at": st.one_of(st.none(), st.floats(), st.integers(-5, 2**40)),
    "split": st.sampled_from([None, "train", "valid", "test", "Train", ""]),
    "before": st.one_of(st.none(), st.lists(st.one_of(st.none(), st.text(max_size=2)), max_size=2)),
    "stars": st.one_of(st.none(), st.lists(st.one_of(st.none(), st.floats()), max_size=2)),
}  # fmt: skip
TYPES = pa.schema(
    [("user", pa.string()), ("shown", pa.list_(pa.string())), ("clicks", pa.list_(pa.float64())), ("at", pa.float64()),
     ("split", pa.string()), ("before", pa.list_(pa.string())), ("stars", pa.list_(pa.float64()))]
)  # fmt: skip


def is_sound(row: dict[str, Any]) -> bool:
    """The rules once more, row by row."""

    def usable(values: list[float | None]) -> bool:
        return all(value is not None and 0 <= value < 3.4e38 for value in values)

    shown, clicks, before, stars = row["shown"], row["clicks"], row["before"], row["stars"]
    if not row["user"] or shown is None or clicks is None or row["split"] not in ("train", "valid", "test"):
        return False
    if row["at"] is None or not 0 <= row["at"] < 4_102_444_800:
        return False
    if (before is None) != (stars is None) or (before is not None and len(before) != len(stars)):
        return False
    return (
        2 <= len(shown) == len(clicks)
        and all(shown)
        and usable(clicks)
        and all(before or [])
        and usable(stars or [])
    )


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.one_of(st.fixed_dictionaries(CELLS), st.just({**GOOD, "user": "good", "shown": list("ab"),
       "clicks": [0, 1], "before": ["c", "d"]})), max_size=12))  # fmt: skip
def test_fuzz_parquet_rows_agree_with_the_rules_applied_one_by_one(rows: list[dict[str, Any]]):
    memory = fsspec.filesystem("memory")
    table = pa.Table.from_pylist(rows, TYPES)
    with memory.open("/fuzz_logged/l.parquet", "wb") as sink:
        pq.write_table(table, sink)
    parse = describe("memory://fuzz_logged/l.parquet", FULL)[0].parse
    assert parse is not None
    parsed = parse(pa.concat_tables([table.slice(0, len(rows) // 2), table.slice(len(rows) // 2)]))
    check(parsed)
    assert parsed.rows_read == len(rows)
    assert parsed.row_of is not None
    assert parsed.row_of.tolist() == [place for place, row in enumerate(rows) if is_sound(row)]
    assert parsed.table["candidates"].to_pylist() == [row["shown"] for row in rows if is_sound(row)]


def test_all_of_kars_lists_come_through():
    path = DATA / "ml-1m-reference-lists" / "lists.parquet"
    if not path.exists():
        pytest.skip("shared/data is not here")
    mapping = LoggedSection(split="split", history="history_item_ids", history_ratings="history_ratings")
    parsed = read(describe(str(path), mapping))
    assert not parsed.quarantined.counts and parsed.rows_read == 103_697
    splits = parsed.table["split"].value_counts().to_pylist()
    assert {row["values"]: row["counts"] for row in splits} == {"train": 94_200, "test": 9_497}
    assert parsed.cleaned == {REPEATED: 685}  # negatives drawn twice, or equal to a positive: they are KAR's
    source = pq.read_table(path)
    for name, column in (
        ("candidates", "candidate_item_ids"),
        ("labels", "labels"),
        ("history", "history_item_ids"),
    ):
        assert (
            parsed.table[name]
            .combine_chunks()
            .equals(source[column].combine_chunks().cast(LISTS.field(name).type))
        )
    assert parsed.table["timestamp_s"].null_count == 103_697
