"""deploy/Dockerfile: linted, and in agreement with what the repository holds. tests/integration/test_image.py builds it."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "deploy" / "Dockerfile"
TEXT = FILE.read_text(encoding="utf-8")


def lint(text: str) -> str:
    """What hadolint says; "" if nothing."""
    linter = shutil.which(
        "hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if linter is None:
        pytest.skip("hadolint is not in this environment (make install)")
    return subprocess.run([linter, "-"], input=text, capture_output=True, text=True).stdout


def test_the_linter_finds_nothing_and_what_is_wrong() -> None:
    assert lint(TEXT) == ""
    assert "DL3002" in lint(TEXT.replace("USER 1000:1000", "USER root"))


def test_what_it_copies_is_there_and_let_through() -> None:
    ignored = (FILE.parent / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    let_through = {line[1:] for line in ignored if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", TEXT, re.MULTILINE) for name in line.split()}
    assert ignored[0] == "*" and copied == let_through
    assert all((ROOT / name).exists() for name in copied)
    for name in ("tests", ".venv", "runs", ".git"):
        assert not any(fnmatch.fnmatch(name, one) for one in let_through)


def test_its_environment_is_that_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\$\{INSTALL\} make (\w+)", TEXT):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for extra in re.findall(r"--build-arg EXTRA=(\w+)", TEXT):
        assert (ROOT / "requirements" / f"{extra}.txt").is_file()
    assert "pip install" not in TEXT  # the versions are the locks'


def test_it_ends_as_a_user_without_rights_whom_kubernetes_can_check() -> None:
    assert re.findall(r"^USER (.*)$", TEXT, re.MULTILINE) == ["1000:1000"]
    assert not re.search(r"(?i)(token|password|secret)\s*=", TEXT)
