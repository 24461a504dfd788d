"""Data as people have it, through the whole stage: what is read, what stops the run, and what is said in words.

The folders of ../shared/cases are read where they are there; files of the same kinds are made here and always read.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo4rec_ray.config import load_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.stages import prepare
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from tests.conftest import local_ray

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
RECIPES, SHARED = ROOT / "jobs" / "recipes", ROOT.parent / "shared"
NUM_USERS, NUM_ITEMS, NUM_EVENTS = 24, 30, 12
START_S = 1_600_000_000


@pytest.fixture(scope="module", autouse=True)
def ray_local() -> Iterator[None]:
    with local_ray(2, store_mib=256):
        yield


class Prepared:
    """The stage over a recipe and overrides, and what it left."""

    def __init__(self, folder: Path, *overrides: str, recipe: str = "own_table", protocol: str = "user"):
        usual = [
            f"data.protocol={protocol}",
            "data.max_history=4",
            "data.valid_frac=0.2",
            "data.test_frac=0.2",
        ]
        config = load_config(RECIPES / f"{recipe}.toml", [*usual, *overrides])
        self.store = RunDir(folder)
        outcome = prepare.run(config, self.store, 0)
        for name in prepare.ARTIFACTS:
            self.store.finish(
                Manifest(artifact=name, fingerprint="x", rows=outcome.rows[name], stats=outcome.stats)
            )

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.store.root / "data" / "report.json").read_text())

    def rows(self, artifact: str) -> list[dict[str, Any]]:
        return self.store.read(artifact).to_pylist()

    def titles(self) -> dict[str, str]:
        return {row["raw_id"]: row["title"] for row in self.rows("items")}

    def quarantine(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.store.root / "data" / "quarantine" / f"{kind}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def event_rows(**change: Any) -> list[list[str]]:
    """user, item, rating, time: 12 events of each of 24 users at 30 items. change: other cells, as functions of the row."""
    rng = np.random.default_rng(1)
    rows = []
    for user in range(NUM_USERS):
        for place, item in enumerate(rng.permutation(NUM_ITEMS)[:NUM_EVENTS].tolist()):
            cells = {"user": str(user), "item": str(item), "rating": str(1 + (user + item) % 5)}
            cells["time"] = str(START_S + 1000 * user + place)
            rows.append(
                [str(change[name](cells) if name in change else cell) for name, cell in cells.items()]
            )
    return rows


def write(
    path: Path, header: list[str], rows: list[list[str]], encoding: str = "utf-8", **dialect: Any
) -> None:
    out = io.StringIO()
    csv.writer(out, **{"lineterminator": "\n", **dialect}).writerows([header, *rows])
    path.write_bytes(out.getvalue().encode(encoding))


def own_table(folder: Path, title: str = "Lamp {}", **change: Any) -> str:
    folder.mkdir(exist_ok=True)
    write(folder / "interactions.csv", ["user_id", "item_id", "rating", "timestamp"], event_rows(**change))
    items = [[str(item), title.format(item), "Green"] for item in range(NUM_ITEMS)]
    write(folder / "items.csv", ["item_id", "title", "genres"], items)
    return f"data.raw_dir={folder}"


def case(name: str) -> str:
    folder = SHARED / "cases" / name
    if not folder.is_dir():
        pytest.skip("the cases are not at ../shared")
    return f"data.raw_dir={folder}"


# The cases.


def test_case_quoted_newline(tmp_path: Path) -> None:
    run = Prepared(tmp_path, case("csv-quoted-newline"))
    assert len(run.titles()) == 30 and run.titles()["7"] == 'Lamp, "tall" and bright 7'
    assert run.report["untitled_items"] == 0 and run.report["quarantined"].get("unreadable") is None


def test_case_semicolon_latin1(tmp_path: Path) -> None:
    raw = case("csv-semicolon-latin1")
    with pytest.raises(UserError, match=r"items\.csv: .* is not in UTF-8; set table\.encoding"):
        Prepared(tmp_path, raw)
    run = Prepared(tmp_path, raw, "table.encoding=latin-1")
    assert run.titles()["7"] == "Lampé n° 7" and run.rows("items")[0]["attributes"] == [
        "genre: Vert",
        "genre: Bleu",
    ]
    assert run.report["remarks"] == ["interactions.csv, items.csv: fields are separated by semicolons"]


def test_case_float_ids(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"items\.csv: 0 of 30 item ids .* such as '\d+\.0' .* would match without \"\.0\""
    ):
        Prepared(tmp_path, case("csv-float-ids"))


def test_case_one_timestamp(tmp_path: Path) -> None:
    raw = case("csv-one-timestamp")
    (sentence,) = Prepared(tmp_path / "user", raw).report["remarks"]
    assert "there is no order in time, and histories and lists are in the order of the file" in sentence
    with pytest.raises(UserError, match="cannot be cut in 3 by time"):
        Prepared(tmp_path / "time", raw, protocol="time")


def test_case_boolean_rating(tmp_path: Path) -> None:
    raw = case("csv-boolean-rating")
    with pytest.raises(
        UserError, match=r"no event is positive: ratings are from 0 to 1, and data\.positive_rating = 4"
    ):
        Prepared(tmp_path / "4", raw)
    run = Prepared(tmp_path / "1", raw, "data.positive_rating=1")
    assert run.report["ratings"] == [0.0, 1.0] and 0 < run.report["positive_events"] < 288
    assert run.report["remarks"] == []


def test_case_atomic(tmp_path: Path) -> None:
    run = Prepared(tmp_path, case("atomic"), "data.dataset=recbole")
    assert run.report["rows_kept"] == 288 and run.report["untitled_items"] == 0
    assert run.titles()["7"] == "Lamp number 7"
    assert {row["raw_id"]: row["profile"] for row in run.rows("users")}["11"] == "age: 31, job: baker"


# Files of the same kinds, made here.


def test_rows_over_lines_are_found_in_the_middle_of_a_large_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first 64 KiB show none: the file is read as lines, then as rows. Line numbers are those of an editor."""
    raw = own_table(tmp_path / "raw")
    extra = [[f"x{n}", "nothing of interest " * 3, ""] for n in range(3000)]
    items = [[str(item), f'Lamp\n{item}, "bright"', "Green"] for item in range(NUM_ITEMS)]
    write(tmp_path / "raw" / "items.csv", ["item_id", "title", "genres"], [*extra, *items])
    with open(tmp_path / "raw" / "items.csv", "ab") as handle:
        handle.write(b'31,"never closed,Green\n32,Last,Green\n')
    run = Prepared(tmp_path / "run", raw)
    assert run.titles() == {str(item): f'Lamp {item}, "bright"' for item in range(NUM_ITEMS)}
    (bad,) = run.quarantine("items")
    assert (bad["line"], bad["reason"]) == (1 + 3000 + 2 * NUM_ITEMS + 1, "a quote is not closed")
    assert bad["text"] == '31,"never closed,Green'
    assert "rows span lines: the files are read again" in capsys.readouterr().out


def test_events_over_lines_are_read_again_too(tmp_path: Path) -> None:
    raw = own_table(tmp_path / "raw")
    rows = [[*row, "no remark" * 30] for row in event_rows()]
    rows[280][4] = "a remark\nof two lines"
    header = ["user_id", "item_id", "rating", "timestamp", "remark"]
    write(tmp_path / "raw" / "interactions.csv", header, rows)
    report = Prepared(tmp_path / "run", raw).report
    assert (report["rows_read"], report["rows_kept"], report["lines_read"]) == (288, 288, 289)


@pytest.mark.parametrize(
    ("file", "overrides", "told"),
    [
        ("users.csv", ["table.users=users.csv"], r"users\.csv: 0 of 24 user ids .* would match without leading zeros"),
        ("lists.csv", ["users"], r"logged\.file: 0 of 24 user ids of the interactions .* logged\.file has '000"),
        ("lists.csv", ["items"], r"logged\.file: 0 of 30 item ids of the interactions .* would match if case"),
    ],
)  # fmt: skip
def test_joins_that_match_nothing_stop_the_run(
    tmp_path: Path, file: str, overrides: list[str], told: str
) -> None:
    change = {"item": lambda cells: f"b{cells['item']}"}
    raw = own_table(tmp_path / "raw", **(change if overrides == ["items"] else {}))
    users = [f"{user:05d}" if overrides != ["items"] else str(user) for user in range(NUM_USERS)]
    if file == "users.csv":
        write(tmp_path / "raw" / file, ["user_id"], [[user] for user in users])
    else:
        letter = "B" if overrides == ["items"] else ""
        lists = [[user, " ".join(f"{letter}{n}" for n in range(8)), "1 0 0 0 0 0 0 0"] for user in users]
        write(tmp_path / "raw" / file, ["user_id", "candidate_item_ids", "labels"], lists)
        overrides = [
            "table.items=",
            "table.attributes={}",
            f"logged.file={tmp_path}/raw/lists.csv",
            "logged.separator= ",
        ]
    with pytest.raises(UserError, match=told):
        Prepared(tmp_path / "run", raw, *overrides)


def test_a_small_file_of_titles_is_a_remark(tmp_path: Path) -> None:
    raw = own_table(tmp_path / "raw")
    write(tmp_path / "raw" / "items.csv", ["item_id", "title", "genres"], [["3", "Lamp", "Green"]])
    (sentence,) = Prepared(tmp_path / "run", raw).report["remarks"]
    assert "29 of 30 items have no title" in sentence


def test_absurd_files_are_said_in_words(tmp_path: Path) -> None:
    def said(name: str, *overrides: str, **change: Any) -> str:
        run = Prepared(tmp_path / f"run-{name}", own_table(tmp_path / name, **change), *overrides)
        return " | ".join(run.report["remarks"])

    assert "some events are from before 1980" not in said("sound") and said("sound") == ""
    assert "from before 1980" in said("seconds", "table.timestamp_unit=ms")
    assert "all events have the rating 5" in said("rating", rating=lambda cells: 5)
    assert "all 288 events are positive" in said("liked", "data.positive_rating=1")
    assert "30 of 30 items have the same title: 'unknown'" in said("titles", title="unknown")
    assert "in the future" in said("future", time=lambda cells: 4_000_000_000 + int(cells["time"]) % 1000)
    same = said(
        "repeated", item=lambda cells: int(cells["item"]) % 12, user=lambda cells: int(cells["user"]) // 4
    )
    assert "of 288 events are repeated ones of the same user and item, and were left out" in same


# Repeated events.


def test_paper_keeps_repeated_events_and_counts_them_in_the_core(tmp_path: Path) -> None:
    """As KAR does. User 0 meets item 0 six times in a row; with a core of 12, all stays only if each of these counts."""

    def item(cells: dict[str, str]) -> str:
        first = cells["user"] == "0" and int(cells["time"]) - START_S < 6
        return "0" if first else cells["item"]

    raw = own_table(tmp_path / "raw", item=item)
    keep = Prepared(
        tmp_path / "paper", raw, f"data.user_core={NUM_EVENTS}", "data.item_core=2", protocol="paper"
    )
    report = keep.report
    assert report["rows_kept"] == 288 and report["filtered"] == report["quarantined"] == {}
    assert report["repeated_events"] >= 5 and report["duplicates"].endswith("all count")
    names = [row["raw_id"] for row in keep.rows("items")]
    user = next(row for row in keep.rows("users") if row["raw_id"] == "0")
    assert [names[item] for item in user["history_item_ids"]] == ["0"] * 4
    (first, *_) = [row for row in keep.rows("lists") if row["user_id"] == user["user_id"]]
    assert len(first["candidate_item_ids"]) == 10 and first["candidate_item_ids"].count(names.index("0")) == 2
    for protocol, overrides in (("user", []), ("paper", ["data.repeated_events=first"])):
        once = Prepared(tmp_path / f"{protocol}-once", raw, *overrides, protocol=protocol).report
        assert (
            once["rows_kept"] == 288 - report["repeated_events"] == 288 - once["filtered"]["repeated events"]
        )
        assert once["quarantined"] == {}
    kept = Prepared(tmp_path / "kept", raw, "data.repeated_events=keep").report
    assert kept["rows_kept"] == 288


def test_a_published_core_comes_in_as_it_is(tmp_path: Path) -> None:
    folder = SHARED / "data" / "amazon-gift-cards"
    if not folder.is_dir():
        pytest.skip("Amazon's Gift Cards are not at ../shared/data")
    report = Prepared(tmp_path, f"data.raw_dir={folder}", recipe="amazon_beauty", protocol="paper").report
    assert report["rows_kept"] == report["rows_read"] - report["quarantined"].get("empty line", 0) > 2900
    assert report["repeated_events"] > 0


def test_repeated_events_have_a_line_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = own_table(tmp_path / "raw", item=lambda cells: int(cells["item"]) % 25)
    for name, overrides, end in (
        ("first", [], "the earliest counts"),
        ("keep", ["data.repeated_events=keep"], "all count"),
    ):
        report = Prepared(tmp_path / name, raw, *overrides).report
        lines = [
            " ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines()
        ]  # [0] is the time
        number = report["repeated_events"]
        assert f"repeated events {number}, of several events of one user and item {end}" in lines
        assert report["repeated_events"] > 0
        assert (report["rows_kept"] < 288) == (name == "first")
    Prepared(tmp_path / "none", own_table(tmp_path / "sound"))
    assert "repeated events" not in capsys.readouterr().out


# A handful of damaged rows, and data without a positive.


def test_a_handful_of_damaged_rows_stops_no_run(tmp_path: Path) -> None:
    """Ten rows without a rating of 288 are set aside; eleven stop the run, and so does one where none is allowed."""

    def raw(name: str, num_bad: int) -> str:
        return own_table(
            tmp_path / name, rating=lambda cells: "" if int(cells["time"]) < bad_s(num_bad) else 4
        )

    def bad_s(num_bad: int) -> int:  # the events of user 0 are the first 12
        return START_S + num_bad

    few = raw("few", 10)
    report = Prepared(tmp_path / "run", few).report
    assert report["quarantined"] == {"missing field rating": 10} and report["rows_kept"] == 278
    with pytest.raises(UserError, match=r"line 2: missing field rating: .*; 11 of 288 rows cannot be used"):
        Prepared(tmp_path / "many", raw("more", 11))
    with pytest.raises(UserError, match=r"10 of 288 .*, more than data\.max_bad_fraction = 0 allows"):
        Prepared(tmp_path / "strict", few, "data.max_bad_fraction=0")


def test_dates_are_told_with_the_unit_that_reads_them(tmp_path: Path) -> None:
    raw = own_table(
        tmp_path / "raw", time=lambda cells: datetime.fromtimestamp(int(cells["time"]), UTC).isoformat(" ")
    )
    with pytest.raises(
        UserError, match=r"set by table\.timestamp_unit, and \"iso\" would read '2020-09-13 12:26:40"
    ):
        Prepared(tmp_path / "s", raw)
    assert Prepared(tmp_path / "iso", raw, "table.timestamp_unit=iso").report["times"][0] == START_S


def test_times_in_nanoseconds(tmp_path: Path) -> None:
    raw = own_table(tmp_path / "raw", time=lambda cells: int(cells["time"]) * 10**9)
    assert Prepared(tmp_path / "run", raw, "table.timestamp_unit=ns").report["times"][0] == START_S


def test_data_without_a_positive_are_refused(tmp_path: Path) -> None:
    raw = own_table(tmp_path / "raw")
    with pytest.raises(
        UserError, match=r"data\.positive_rating = 4; set it to 1, which every event without a rating"
    ):
        Prepared(tmp_path / "clicks", raw, "table.rating=")
    assert (
        Prepared(tmp_path / "1", raw, "table.rating=", "data.positive_rating=1").report["positive_events"]
        == 288
    )
    lists = [[str(user), " ".join(map(str, range(8))), " ".join("0" * 8)] for user in range(NUM_USERS)]
    write(tmp_path / "raw" / "lists.csv", ["user_id", "candidate_item_ids", "labels"], lists)
    with pytest.raises(
        UserError, match=r"no candidate of logged\.file has a label above 0; check logged\.labels"
    ):
        Prepared(tmp_path / "lists", raw, f"logged.file={tmp_path}/raw/lists.csv", "logged.separator= ")


# MIND.

MIND_START = datetime(2019, 11, 9, tzinfo=UTC)


def mind(folder: Path, num_users: int = 40) -> dict[str, list[str]]:
    """News and behaviors as in MIND's folders; the history of each user. One user has none, one line has no list."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    news = [
        f'N{n}\tnews\tnewsworld\tHe said "yes" to {n}\tAn "abstract\thttps://x/{n}.html\t[]\t[{{"Label": "x"}}]'
        for n in range(90)
    ]
    news[5] = news[5].replace("He said", '"He said')
    (folder / "news.tsv").write_text("\n".join(news) + "\n")
    histories, lines = {}, []
    for user in range(num_users):
        history = [f"N{n}" for n in rng.permutation(50)[: int(rng.integers(3, 9))]] if user else []
        histories[f"U{user}"] = history
        for _ in range(3):
            shown = rng.permutation(np.arange(50, 90))[: int(rng.integers(2, 12))]
            clicked = rng.integers(len(shown))
            marked = " ".join(f"N{n}-{int(place == clicked)}" for place, n in enumerate(shown))
            at = datetime.fromtimestamp(MIND_START.timestamp() + int(rng.integers(500_000)), UTC)
            time = f"{at.month}/{at.day}/{at.year} {at.hour % 12 or 12}:{at:%M:%S} {'AM' if at.hour < 12 else 'PM'}"
            lines.append(f"{len(lines) + 1}\tU{user}\t{time}\t{' '.join(history)}\t{marked}")
    lines.append(f"{len(lines) + 1}\tU1\t11/15/2019 9:55:12 AM\t{' '.join(histories['U1'])}\tN60-1")
    (folder / "behaviors.tsv").write_text("\n".join(lines) + "\n")
    return histories


def test_mind_as_downloaded(tmp_path: Path) -> None:
    folder = tmp_path / "MINDsmall_train"
    histories = mind(folder)
    paths = (f"data.raw_dir={folder}", f"logged.file={folder}/behaviors.tsv")
    run = Prepared(tmp_path / "run", *paths, "data.max_history=30", recipe="mind")
    names = [row["raw_id"] for row in run.rows("items")]
    users = {row["user_id"]: row for row in run.rows("users")}
    assert run.titles()["N5"] == '"He said "yes" to 5' and len(names) > 50
    assert run.rows("items")[0]["attributes"] == ["category: news", "subcategory: newsworld"]
    for user in users.values():  # the clicks before the log, each once, in their order
        assert [names[item] for item in user["history_item_ids"]] == histories[user["raw_id"]]
    lists = run.rows("lists")
    assert len(lists) == 120 and len(users) == 40
    for row in lists:
        candidates = [names[item] for item in row["candidate_item_ids"]]
        assert sum(row["labels"]) == 1 and not set(candidates) & set(
            histories[users[row["user_id"]]["raw_id"]]
        )
        assert MIND_START.timestamp() <= row["timestamp_s"] < MIND_START.timestamp() + 500_000
        assert [names[item] for item in row["history_item_ids"]] == histories[users[row["user_id"]]["raw_id"]]
    assert [one["reason"] for one in run.quarantine("lists")] == ["not 2 to 200 candidates"]
    assert run.quarantine("lists")[0]["line"] == 121
