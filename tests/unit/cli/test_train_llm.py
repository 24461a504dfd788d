"""Where the model of `dpo4rec train-llm` goes is looked at before it is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_ray.cli import train_llm


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The stages that were started; the first one ends the command."""
    found: list[object] = []

    def run(options: object) -> int:
        found.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_llm.run, "run", run)
    return found


@pytest.mark.parametrize("below", ["", "model", "deep/model"])
def test_a_file_in_the_way_of_the_model(
    below: str, started: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert train_llm.main(["demo", "--out", str(file / below)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --out {file / below}: ") and said.count("\n") == 1
    assert not started and file.read_text() == "mine"


def test_other_files_there(started: list[object], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert train_llm.main(["demo", "--out", str(tmp_path)]) == 2 and not started


def test_a_mistake_in_the_recipe_makes_no_folder(started: list[object], tmp_path: Path) -> None:
    assert train_llm.main(["demo", "generate.num_sample=2", "--out", str(tmp_path / "model")]) == 2
    assert not (tmp_path / "model").exists() and not started


def test_a_new_folder_and_one_with_an_older_model(started: list[object], tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    for name in ("old", "new"):
        assert train_llm.main(["demo", "--out", str(tmp_path / name)]) == 130
    assert len(started) == 2
