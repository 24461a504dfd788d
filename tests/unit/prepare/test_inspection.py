"""From the recipe to the data source: sections arrive whole, and the raw files are looked at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.data import LoggedSection, SampleSection, TableSection
from dpo4rec_ray.datasets import Source, logged, synthetic, table
from dpo4rec_ray.datasets.source import DataFile
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.prepare.inspection import (
    MAX_NAMES,
    file_names,
    files_of_run,
    inspect_source,
    source_of,
    take_source,
)
from dpo4rec_ray.store.artifacts import Manifest, RunDir

EMPTY = Source(())


class WiderTable(TableSection):
    note: str = ""


class WiderLogged(LoggedSection):
    note: str = ""


class WiderSample(SampleSection):
    note: str = ""


class WiderConfig(Config):
    table: WiderTable = WiderTable()
    logged: WiderLogged = WiderLogged()
    sample: WiderSample = WiderSample()


def test_a_new_key_of_a_section_is_found_in_the_component(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}
    monkeypatch.setattr(table, "describe", lambda _, section: seen.update(table=section.note) or EMPTY)
    monkeypatch.setattr(logged, "describe", lambda _, section: seen.update(logged=section.note) or ())
    monkeypatch.setattr(synthetic, "describe", lambda section, _: seen.update(sample=section.note) or EMPTY)
    for dataset in ("table", "sample"):
        source_of(
            WiderConfig.model_validate(
                {
                    "data": {"dataset": dataset, "raw_dir": "."},
                    "table": {"note": "of the table"},
                    "logged": {"note": "of the log", "file": "lists.parquet"},
                    "sample": {"note": "of the sample"},
                }
            )
        )
    assert seen == {"table": "of the table", "logged": "of the log", "sample": "of the sample"}


def test_the_files_are_looked_at_once_until_prepare_has_used_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    monkeypatch.setattr(
        table, "describe", lambda raw_dir, _: looks.append(raw_dir) or Source((DataFile(raw_dir),))
    )
    one, other = (
        Config.model_validate({"data": {"dataset": "table", "raw_dir": str(tmp_path / name)}})
        for name in ("one", "other")
    )
    found = inspect_source(one)
    assert source_of(one) is found and source_of(one) is found and looks == [str(tmp_path / "one")]
    assert inspect_source(one) is not found and len(looks) == 2, "the checks of a run look again"
    assert source_of(other).events[0].path == str(tmp_path / "other")
    used = take_source(other)
    assert len(looks) == 3
    assert source_of(other) is not used and len(looks) == 4


def test_a_failed_look_leaves_nothing_behind(tmp_path: Path) -> None:
    config = Config.model_validate({"data": {"dataset": "movielens", "raw_dir": str(tmp_path / "no")}})
    for _ in range(2):
        with pytest.raises(UserError, match="not found"):
            source_of(config)


def test_names_of_files_hold_no_folder_and_no_secret() -> None:
    files = (DataFile("s3://bucket/Books_5.json.gz?access_key=k"), DataFile("/raw/users.dat"))
    memory = DataFile("the sample world", kind="memory")
    assert file_names(Source((files[0], memory), users=(files[1],))) == ["Books_5.json.gz", "users.dat"]
    assert len(file_names(Source((files[1],) * 100))) == MAX_NAMES


def test_the_files_of_a_run_are_those_that_prepare_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data prepared by an older version names no files: then the raw files are looked at."""
    monkeypatch.setattr(table, "describe", lambda *_: Source((DataFile("/raw/now.csv"),)))
    config = Config.model_validate({"data": {"dataset": "table", "raw_dir": str(tmp_path)}})
    store = RunDir(tmp_path / "run")
    for stats, files in (({"files": ["then.csv"]}, ["then.csv"]), ({}, ["now.csv"])):
        store.start("lists")
        store.finish(Manifest(artifact="lists", fingerprint="x", rows=1, stats=stats))
        assert files_of_run(config, store) == files
