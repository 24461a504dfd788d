"""Texts from Parquet, JSONL and KAR's .klg: found by id, in file order; a row without a text is left out and reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge import text_table
from dpo4rec_ray.knowledge.text_table import TextCounts, TextTable, check_text_file, place_texts

COLUMNS = ("user", "text")
RAW = ["u7", "12", "3", "none"]  # raw ids of users 0 to 3


def place(source: Path, target: Path, identity: str = "1") -> TextCounts | None:
    return place_texts(str(source), COLUMNS, pa.array(RAW), np.arange(len(RAW)), target, identity)


def jsonl(file: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def row(user: Any, text: Any) -> dict[str, Any]:
    return {"user": user, "text": text, "more": [1]}


ROWS = [("12", "b"), ("u7", "first"), ("3", "\u00fc \U0001f3ac"), ("u7", "second"), ("u7", "third")]
FOUND = {0: ["first", "second", "third"], 1: ["b"], 2: ["\u00fc \U0001f3ac"], 3: []}


def write(kind: str, folder: Path) -> Path:
    file = folder / f"texts.{kind}"
    if kind == "jsonl":
        return jsonl(file, *[row(*pair) for pair in ROWS])
    users, texts = zip(*ROWS, strict=True)
    pq.write_table(pa.table({"text": texts, "user": users, "more": [0] * len(ROWS)}), file, row_group_size=2)
    return file


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_samples_in_file_order(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_table, "_BATCH", 2)  # texts of one user lie in several batches
    source, target = write(kind, tmp_path), tmp_path / "laid" / "users.arrow"
    check_text_file("texts.users", str(source), *COLUMNS)
    counts = place(source, target)
    assert counts is not None and counts.texts == 5 and not counts.left_out
    table = TextTable(target)
    assert {user: table.of(user, 9) for user in FOUND} == FOUND
    assert table.of(0, 2) == ["first", "second"]
    assert list(tmp_path.rglob("*.tmp*")) == []


@pytest.mark.parametrize("name", ["ans", "answer"])
@pytest.mark.parametrize("indent", [None, 2])
def test_klg(tmp_path: Path, name: str, indent: int | None) -> None:
    """As KAR published it, and as others write it."""
    source, target = tmp_path / "user.klg", tmp_path / "users.arrow"
    content = {
        "12": {"prompt": "Given a female user ...", name: "she likes drama"},
        "3": "a text without a prompt",
        "u7": {"prompt": "only a prompt"},
        "99": {"prompt": "", name: "somebody else"},
        "none": {"prompt": "", name: None},
    }
    source.write_text(json.dumps(content, indent=indent))
    check_text_file("texts.users", str(source), *COLUMNS)
    counts = place(source, target)
    assert counts is not None and counts.texts == 2
    assert counts.left_out == {"no text": 2, "unknown id": 1}
    assert counts.words == "2 x no text (id 'u7', id 'none'), 1 x unknown id (id '99': '99')"
    table = TextTable(target)
    assert [table.of(user, 1) for user in range(4)] == [
        [],
        ["she likes drama"],
        ["a text without a prompt"],
        [],
    ]


def test_what_is_no_text_is_left_out_and_named(tmp_path: Path) -> None:
    source = jsonl(
        tmp_path / "t.jsonl",
        b"\xef\xbb\xbf" + json.dumps(row(12, "an integer is its digits")).encode(),
        b"",
        row("3", None),
        b'{"user": "3", "text": "cut o',
        row("3", 5),
        row("3", ["a"]),
        b'{"user": "3", "text": "\\ud800"}',  # half a character
        b'{"user": "3", "text": "\xff\xfe"}',
        row(None, "a"),
        row(True, "a"),
        row(1.5, "a"),
        row("3", "  "),
        b"[1]",
        b"[" * 100_000,
        b"9" * 5000,
        row("who", "a"),
        row("who", "a"),
        {"text": "a"},
        row("3", "good"),
    )
    target = tmp_path / "users.arrow"
    counts = place(source, target)
    assert counts is not None and counts.texts == 2
    assert counts.left_out == {"no text": 5, "not a JSON object": 5, "no id": 4, "unknown id": 2}
    assert "5 x no text (line 3, line 5, line 6, ...)" in counts.words
    assert "5 x not a JSON object (line 4, line 8, line 13, ...)" in counts.words
    assert "4 x no id (line 9, line 10, line 11, ...)" in counts.words
    assert "2 x unknown id (line 16: 'who', line 17: 'who')" in counts.words
    table = TextTable(target)
    assert [table.of(user, 5) for user in range(4)] == [[], ["an integer is its digits"], ["good"], []]


def test_parquet_of_other_types(tmp_path: Path) -> None:
    """Integer ids, nulls, and strings that are not UTF-8."""
    raw = pa.array([b"good", b"\xff", None, b"again"])
    texts = pa.Array.from_buffers(pa.string(), 4, raw.cast(pa.binary()).buffers())
    pq.write_table(pa.table({"user": [12, 12, 3, 3], "text": texts}), tmp_path / "t.parquet")
    counts = place(tmp_path / "t.parquet", tmp_path / "users.arrow")
    assert counts is not None and counts.words == "2 x no text (row 2, row 3)"
    assert [TextTable(tmp_path / "users.arrow").of(user, 5) for user in (1, 2)] == [["good"], ["again"]]


def test_it_is_done_once_for_the_same_file(tmp_path: Path) -> None:
    source, target = jsonl(tmp_path / "t.jsonl", row("3", "a"), row("who", "b")), tmp_path / "users.arrow"
    assert place(source, target, "1") is not None
    jsonl(source, row("3", "changed"))
    assert place(source, target, "1") is None
    assert TextTable(target).of(2, 1) == ["a"]
    assert place(source, target, "2") is not None
    assert TextTable(target).of(2, 1) == ["changed"]
    target.write_bytes(target.read_bytes()[:40])  # what an earlier job left may be damaged
    assert place(source, target, "2") is not None


def test_large_files_stay_on_disk(tmp_path: Path) -> None:
    """Texts of 200 MB take no memory of their own until they are asked for."""
    number, length = 2000, 100_000
    file = tmp_path / "t.parquet"
    texts = [f"{i:06d}".ljust(length, "x") for i in range(number)]
    pq.write_table(
        pa.table({"user": [str(i) for i in range(number)], "text": texts}), file, row_group_size=100
    )
    raw, ids = pa.array([str(i) for i in range(number)]), np.arange(number)
    before = pa.total_allocated_bytes()
    place_texts(str(file), COLUMNS, raw, ids, tmp_path / "users.arrow", "1")
    assert (tmp_path / "users.arrow").stat().st_size > number * length
    table = TextTable(tmp_path / "users.arrow")
    assert pa.total_allocated_bytes() - before < 20e6
    assert [table.of(user, 1)[0][:6] for user in (0, 1999, 777)] == ["000000", "001999", "000777"]


def test_nobody_is_known(tmp_path: Path) -> None:
    target = tmp_path / "users.arrow"
    source = jsonl(tmp_path / "t.jsonl", row("1", "a"), row("2", "b"))
    with pytest.raises(
        UserError, match=r"t.jsonl: holds no text.*2 x unknown id.*the data has ids such as 'u7'"
    ):
        place(source, target)
    assert not target.exists() and list(tmp_path.iterdir()) == [source]
    with pytest.raises(UserError, match="it is empty"):
        place(jsonl(tmp_path / "e.jsonl"), target)


def test_almost_nobody_is_known(tmp_path: Path) -> None:
    """One of 200 users matches by accident; the message shows an id of either side, and what would make them match."""
    raw, target = [f"{user:04d}" for user in range(1000, 1199)] + ["7"], tmp_path / "users.arrow"
    source = jsonl(
        tmp_path / "t.jsonl", *(row(f"{user}.0", "a") for user in range(1000, 1199)), row("7", "b")
    )
    with pytest.raises(
        UserError, match=r"1 of 200 raw ids of the data .*'1000' .*'1000.0'.*match without \"\.0\""
    ):
        place_texts(str(source), COLUMNS, pa.array(raw), np.arange(200), target, "1")
    assert list(tmp_path.iterdir()) == [source]
    few = jsonl(
        tmp_path / "few.jsonl", row("7", "b"), row("1000", "a")
    )  # a small file about a few of many users
    counts = place_texts(str(few), COLUMNS, pa.array(raw), np.arange(200), target, "1")
    assert counts is not None and counts.texts == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.parquet", None, "no such file"),
        ("t.csv", b"user,text\n", "not from .csv"),
        ("t.parquet", b"PAR1 not at all", "not a Parquet file"),
        ("t.jsonl", b'{"id": 1, "text": "a"}\n', r"no column 'user' \(found: id, text\)"),
        ("t.jsonl", b"nothing of the kind\n", r"no column 'user' \(found: none\)"),
        ("t.jsonl", b'{"user": 1, "txt": "a"}\n', r"no column 'text' \(found: user, txt\)"),
    ],
)
def test_a_file_is_looked_at_before_the_run(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"texts.users .*{words}"):
        check_text_file("texts.users", str(tmp_path / name), *COLUMNS)


@pytest.mark.parametrize("content", ["[1, 2]", '{"1": {"prompt"', '"text"', "[" * 100_000])
def test_a_klg_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "user.klg").write_text(content)
    with pytest.raises(UserError, match=r"user.klg: (not JSON|KAR's layout)"):
        place(tmp_path / "user.klg", tmp_path / "users.arrow")


def test_damaged_parquet(tmp_path: Path) -> None:
    source = write("parquet", tmp_path)
    content = bytearray(source.read_bytes())
    content[4:40] = b"\xff" * 36
    source.write_bytes(bytes(content))
    with pytest.raises(UserError, match="cannot be read, or is damaged"):
        place(source, tmp_path / "users.arrow")
