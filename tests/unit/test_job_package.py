"""What `ray job submit --working-dir .` sends: the package and the entry points, and little else."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

MAX_MIB = 4


def test_the_package_of_a_job_is_small(tmp_path: Path) -> None:
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    quiet = logging.getLogger("quiet")
    quiet.setLevel(logging.ERROR)
    target = tmp_path / "job.zip"
    excludes = [".git", ".venv", "venv", "__pycache__"]  # Ray's own, where none are given
    packaging.create_package(str(ROOT), target, include_gitignore=True, excludes=excludes, logger=quiet)
    with zipfile.ZipFile(target) as archive:
        names = archive.namelist()
    assert {"jobs/run.py", "dpo4rec_ray/cli/run.py", "dpo4rec_ray/recipes/demo.toml"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "docs/", "benchmarks/", "runs/"))]
    assert target.stat().st_size < MAX_MIB * 2**20
