"""Bundled recipes by name, and recipes by path."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from dpo4rec_ray.cli import recipes, sample
from dpo4rec_ray.config import bundled_recipes, load_config
from dpo4rec_ray.datasets import load_source
from dpo4rec_ray.datasets.source import DataFile
from dpo4rec_ray.datasets.synthetic import describe
from dpo4rec_ray.errors import UserError
from tests.conftest import ROOT


@pytest.mark.parametrize("name", bundled_recipes.names())
def test_every_bundled_recipe_is_read_by_name_and_by_its_former_path(name: str) -> None:
    config = load_config(name)
    assert config == load_config(ROOT / "jobs" / "recipes" / f"{name}.toml")
    assert config.run.name == name
    assert 20 < len(bundled_recipes.purpose(name)) < 130


def test_the_former_folder_is_a_relative_link() -> None:
    """So that old commands work in a copy of the checkout too."""
    link = ROOT / "jobs" / "recipes"
    assert link.is_symlink() and not link.readlink().is_absolute()


def test_a_path_is_never_a_bundled_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo.toml", "demo", "mine"):
        Path(name).write_text('[run]\nname = "own"\n')
    assert load_config("demo.toml").run.name == "own"
    assert load_config("./demo.toml").run.name == "own"
    assert load_config(tmp_path / "demo").run.name == "own"
    assert load_config("mine").run.name == "own"  # a bare name that no bundled recipe has
    assert load_config("demo").run.name == "demo"
    Path("demo.toml").unlink()
    with pytest.raises(
        UserError, match=r"recipe demo\.toml: cannot be read .* bundled ones go by name: .*demo"
    ):
        load_config("demo.toml")


def test_a_folder_is_not_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    with pytest.raises(UserError, match="'runs': neither a bundled recipe nor a file"):
        load_config("runs")


def test_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == bundled_recipes.names()
    assert recipes.main(["show", "ml1m"]) == 0
    assert capsys.readouterr().out == (bundled_recipes.FOLDER / "ml1m.toml").read_text()


def parsed(file: DataFile) -> pa.Table:
    """All rows of a file, none of them bad."""
    assert file.parse is not None
    found = file.parse(Path(file.path).read_bytes().split(b"\n", 1)[1])
    assert not found.quarantined.counts and not found.cleaned
    return found.table


def test_the_sample_world_as_files_is_the_sample_world(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe own_table reads the same events and items that the recipe demo makes in memory."""
    folder = tmp_path / "new" / "world"
    assert sample.main([str(folder), "sample.num_users=50", "run.seed=3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"use it: dpo4rec run own_table data.raw_dir={folder}"
    config = load_config("own_table", [f"data.raw_dir={folder}"])
    source = load_source(config)
    drawn = load_config("demo", ["sample.num_users=50", "run.seed=3"])
    world = describe(drawn.sample, drawn.run.seed)
    events, items = parsed(source.events[0]), parsed(source.items[0])
    memory = world.events[0].table
    assert memory is not None
    assert events.select(["user", "item", "rating", "timestamp_s"]).to_pylist() == memory.to_pylist()
    listed = world.items[0].table
    assert listed is not None
    assert items["title"].to_pylist() == listed["title"].to_pylist()
    genres = [[one for one in own if one.startswith("genre: ")] for own in listed["attributes"].to_pylist()]
    assert items["attributes"].to_pylist() == genres


def test_files_that_are_there_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "items.csv").write_text("mine")
    assert sample.main([str(tmp_path)]) == 2
    assert "items.csv: is there already; name another folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["items.csv"]
    assert (tmp_path / "items.csv").read_text() == "mine"
