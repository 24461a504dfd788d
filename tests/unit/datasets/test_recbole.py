"""RecBole's atomic files as its users have them: with nothing mapped, whatever columns there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dpo4rec_ray.config import Config
from dpo4rec_ray.datasets import files, load_source
from dpo4rec_ray.datasets.recbole import describe
from dpo4rec_ray.datasets.source import DataFile, Source
from dpo4rec_ray.errors import UserError

# The first lines of ml-100k as RecBole publishes it, and a title with a quote.
INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n186\t302\t3.5\t891717742\n"
ITEM = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "242\tKolya\t1996\tComedy\n302\tL.A. \"Confidential\"\t1997\tCrime Film-Noir Mystery Thriller\n"
)  # fmt: skip
USER = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n196\t49\tM\twriter\t55105\n"


def rows(described: tuple[DataFile, ...]) -> list[dict[str, Any]]:
    tables: list[pa.Table] = []
    for split in files.plan_splits(described):
        file = described[split.file]
        assert file.parse is not None
        parsed = [file.parse(block.content) for block in files.read_blocks(split, file)]
        assert not any(one.quarantined.counts for one in parsed)
        tables += [one.table for one in parsed]
    return pa.concat_tables(tables).to_pylist()


def write(folder: Path, **texts: str) -> str:
    for name, text in texts.items():
        (folder / f"ml-100k.{name}").write_text(text)
    return str(folder)


def test_ml_100k_as_published(tmp_path: Path):
    write(tmp_path, inter=INTER, item=ITEM, user=USER, kg="head_id:token\n", link="item_id:token\n")
    source = load_source(Config.model_validate({"data": {"dataset": "recbole", "raw_dir": str(tmp_path)}}))
    assert rows(source.events) == [
        {"user": "196", "item": "242", "rating": 3.0, "timestamp_s": 881250949},
        {"user": "186", "item": "302", "rating": 3.5, "timestamp_s": 891717742},
    ]
    assert rows(source.items) == [
        {"raw_id": "242", "title": "Kolya", "attributes": ["release_year: 1996", "class: Comedy"]},
        {
            "raw_id": "302",
            "title": 'L.A. "Confidential"',
            "attributes": ["release_year: 1997", "class: Crime", "class: Film-Noir", "class: Mystery", "class: Thriller"],
        },
    ]  # fmt: skip
    assert rows(source.users) == [
        {"raw_id": "196", "profile": "age: 49, gender: M, occupation: writer, zip_code: 55105"}
    ]
    assert not source.closed


@pytest.mark.parametrize(
    ("inter", "event"),
    [
        (
            "item_id:token\tuser_id:token\nb\tu\n",
            {"rating": 1.0, "timestamp_s": 0},
        ),  # implicit, in file order
        ("user_id:token\titem_id:token\tlabel:float\nu\tb\t0\n", {"rating": 0.0, "timestamp_s": 0}),
        (
            "user_id:token\titem_id:token\trating:float\tlabel:float\nu\tb\t-7\t1\n",
            {"rating": -7.0, "timestamp_s": 0},
        ),
        (
            "user_id:token\titem_id:token\ttimestamp:float\tx:float_seq\nu\tb\t12.9\t1 2\n",
            {"rating": 1.0, "timestamp_s": 12},
        ),
    ],
)
def test_interactions_with_and_without_ratings_and_times(tmp_path: Path, inter: str, event: dict[str, Any]):
    source = describe(write(tmp_path, inter=inter))
    assert rows(source.events) == [{"user": "u", "item": "b", **event}]
    assert source.items == source.users == ()


def test_items_without_a_title_and_with_numbers(tmp_path: Path):
    item = "item_id:token\tprice:float\tcity:token\tvec:float_seq\n242\t3.5\tNew York\t1 2\n"
    source = describe(write(tmp_path, inter=INTER, item=item, user="user_id:token\n196\n"))
    assert rows(source.items) == [{"raw_id": "242", "title": None, "attributes": ["city: New York"]}]
    assert rows(source.users) == [{"raw_id": "196", "profile": ""}]


def test_times_in_milliseconds_are_set(tmp_path: Path):
    folder = write(tmp_path, inter=INTER.replace("881250949", "881250949000").replace("742", "742000"))
    assert rows(describe(folder, timestamp_unit="ms").events)[0]["timestamp_s"] == 881250949


def test_a_dataset_that_was_split_and_a_folder_of_several(tmp_path: Path):
    (tmp_path / "a.train.inter").write_text(INTER)
    (tmp_path / "a.test.inter").write_text(INTER)
    (tmp_path / "a.item").write_text(ITEM)
    source = describe(str(tmp_path))
    assert len(rows(source.events)) == 4 and len(rows(source.items)) == 2
    (tmp_path / "b.inter").write_text(INTER)
    with pytest.raises(UserError, match=r"several datasets; set data.file .*found: a.item, a.test.inter"):
        describe(str(tmp_path))
    assert len(rows(describe(str(tmp_path), "b.inter").events)) == 2
    with pytest.raises(UserError, match=r"no .inter file named 'c.inter' \(data.file\)"):
        describe(str(tmp_path), "c.inter")


def users_of(source: Source) -> list[str]:
    return [row["user"] for row in rows(source.events)]


def one_event(path: Path, user: str) -> None:
    path.write_text(f"user_id:token\titem_id:token\n{user}\tb\n")


def test_a_split_is_read_in_the_order_of_its_parts_and_a_whole_file_alone(tmp_path: Path):
    """Without times the order of the files is the order of the events."""
    for part in ("test", "train", "valid"):
        one_event(tmp_path / f"ml.{part}.inter", part)
    assert users_of(describe(str(tmp_path))) == ["train", "valid", "test"]
    assert users_of(describe(str(tmp_path), "ml.valid.inter")) == ["valid"]
    one_event(tmp_path / "ml.inter", "whole")
    assert users_of(describe(str(tmp_path))) == ["whole"]


def test_dots_belong_to_the_name_of_a_dataset(tmp_path: Path):
    for version in ("v1", "v2"):
        one_event(tmp_path / f"shop.{version}.inter", version)
        (tmp_path / f"shop.{version}.item").write_text(f"item_id:token\ttitle:token_seq\nb\tof {version}\n")
    with pytest.raises(UserError, match=r"several datasets; set data\.file"):
        describe(str(tmp_path))
    source = describe(str(tmp_path), "shop.v2.inter")
    assert users_of(source) == ["v2"]
    assert [row["title"] for row in rows(source.items)] == ["of v2"]


def test_mistakes_are_told(tmp_path: Path):
    with pytest.raises(UserError, match=r"no \.inter file; found: nothing"):
        describe(str(tmp_path))
    for inter, told in (
        ("user_id\titem_id\nu\tb\n", "the column 'user_id' has no type, as in user_id:token"),
        (
            "uid:token\titem_id:token\nu\tb\n",
            r'no column user_id \(found: uid, item_id\); .*dataset = "table"',
        ),
        ("user_id:token\titem_id_list:token_seq\nu\tb\n", "no column item_id"),
    ):
        with pytest.raises(UserError, match=told):
            describe(write(tmp_path, inter=inter))
    with pytest.raises(UserError, match=r"the column 'item_id' \(table.item_id\) is not there"):
        describe(write(tmp_path, inter=INTER, item="iid:token\n"))
