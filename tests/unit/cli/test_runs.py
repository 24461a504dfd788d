"""The listing of runs: what cannot be read hides no other run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_ray.cli import runs
from dpo4rec_ray.config import load_config
from dpo4rec_ray.store.artifacts import write_json


def test_a_run_that_cannot_be_read_has_its_own_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a_half", "b_old", "c_empty", "z_good"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", load_config("demo").model_dump(mode="json"))
    (tmp_path / "a_half" / "summary.json").write_text('{"comparisons": [')
    (tmp_path / "b_old" / "summary.json").write_text("{}")
    (tmp_path / "c_empty" / "config.json").write_text("")
    assert runs.main([str(tmp_path)]) == 0
    half, old, empty, good = capsys.readouterr().out.splitlines()
    assert half.startswith("a_half   cannot be read: Expecting value")
    assert old == "b_old    cannot be read: KeyError: 'comparisons'"
    assert empty.startswith("c_empty  cannot be read: ")
    assert good == "z_good   not finished: prepare(0) is next"


def test_a_folder_that_may_not_be_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked").mkdir()
    is_file = Path.is_file

    def refused(file: Path) -> bool:
        if file.parent.name == "locked":
            raise PermissionError(13, "Permission denied", str(file))
        return is_file(file)

    monkeypatch.setattr(Path, "is_file", refused)
    assert runs.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("locked  cannot be read: [Errno 13] Permission denied")
