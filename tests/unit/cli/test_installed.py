"""Whether a cluster's nodes run the same code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo4rec_ray.cli import installed
from dpo4rec_ray.errors import UserError
from tests.conftest import local_ray


def test_the_version_is_what_is_in_the_python_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "PACKAGE", tmp_path)
    file, seen = tmp_path / "a.py", [installed.code_version()]
    for text in ("x = 1", "x = 2"):
        file.write_text(text)
        seen.append(installed.code_version())
    file.rename(tmp_path / "b.py")
    seen.append(installed.code_version())
    assert len(set(seen)) == 4
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__/b.pyc").write_bytes(b"x")
    assert installed.code_version() == seen[-1]


@pytest.fixture
def ray_local() -> Iterator[None]:
    with local_ray(1):
        yield


@pytest.mark.ray
def test_nodes_with_the_same_and_with_other_code(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.check_nodes()
    (tmp_path / "a.py").write_text("newer")
    monkeypatch.setattr(installed, "PACKAGE", tmp_path)  # of this process alone
    with pytest.raises(UserError, match=r"node [\d.]+ has another version of dpo4rec_ray"):
        installed.check_nodes()
