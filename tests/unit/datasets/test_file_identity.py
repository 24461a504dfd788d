"""When a raw file counts as another one, so that all that was made from it is made again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from dpo4rec_ray.datasets import files
from dpo4rec_ray.datasets.files import file_identity


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    file = tmp_path / "ratings.dat"
    file.write_text("1::2::5::978300760\n")
    return file


def test_a_copy_is_the_same_file(raw: Path, tmp_path: Path) -> None:
    before = file_identity(str(raw))
    os.utime(raw, (1, 1))
    assert file_identity(str(raw)) == before
    copy = tmp_path / "elsewhere" / raw.name
    copy.parent.mkdir()
    shutil.copy(raw, copy)
    assert file_identity(str(copy)) == file_identity(f"file://{copy}") == before


def test_one_other_byte_is_another_file(raw: Path) -> None:
    before, time = file_identity(str(raw)), raw.stat().st_mtime_ns
    raw.write_text("1::2::4::978300760\n")
    os.utime(raw, ns=(time, time))
    assert file_identity(str(raw)) != before


def test_a_large_file_is_known_by_size_and_time(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "HASHED_BYTES", 4)
    before = file_identity(str(raw))
    assert str(raw) in before
    os.utime(raw, (1, 1))
    assert file_identity(str(raw)) != before


def test_files_that_are_not_there_have_an_identity_too(tmp_path: Path) -> None:
    assert file_identity(str(tmp_path / "missing")) != file_identity(str(tmp_path / "other"))
