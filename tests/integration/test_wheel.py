"""The package as a user gets it: built from a clean copy, installed into an empty environment, used in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import dpo4rec_ray
from dpo4rec_ray.config import bundled_recipes
from dpo4rec_ray.store import versions
from tests.conftest import ROOT

SOURCES = ("dpo4rec_ray", "pyproject.toml", "README.md", "LICENSE")


def pip(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the environment's setuptools, as `make wheel` does."""
    copy, dist = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", dist, copy)
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of an environment with the wheel in it, which sees what the tests' own has.

    A path in a .pth file is searched for modules, but not for .pth files: an editable install of this checkout is not seen.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip("--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = Path(sysconfig.get_path("purelib", vars={"base": folder, "platbase": folder}))
    assert (site / "dpo4rec_ray").is_dir()
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "dependencies.pth").write_text("\n".join(paths))
    return folder / "bin"


def run(command: list[str | Path], folder: Path) -> str:
    """What a command of the environment prints, in `folder`, where nothing points to this checkout."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=folder, env={**env, "RAY_ADDRESS": ""}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    ours = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "dpo4rec_ray").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == ours
    assert {"dpo4rec_ray/recipes/demo.toml", "dpo4rec_ray/py.typed"} < inside


def test_its_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    found = message_from_string(archive.read(name).decode())
    assert found["Name"] == "dpo4rec-ray" and found["Version"] == dpo4rec_ray.__version__
    assert found["Author"] == "dpo4rec_ray developers"
    assert found["License-Expression"] == "Apache-2.0"
    assert "Operating System :: POSIX :: Linux" in found.get_all("Classifier", [])
    requirements = found.get_all("Requires-Dist", [])
    assert any(line.startswith("shtab") for line in requirements)


def test_commands_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = run([installed / "python", "-c", "import dpo4rec_ray; print(dpo4rec_ray.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    listed = run([installed / "dpo4rec", "recipes", "list"], tmp_path)
    assert [line.split()[0] for line in listed.splitlines()] == bundled_recipes.names()
    printed = run([installed / "dpo4rec", "version"], tmp_path)
    assert printed.split()[:2] == ["dpo4rec-ray", dpo4rec_ray.__version__]
    assert "prepare(0)      would run: not there yet" in run(
        [installed / "dpo4rec", "run", "demo", "--dry-run"], tmp_path
    )
    assert list(tmp_path.iterdir()) == []


def test_the_commit_of_another_checkout_is_not_taken_for_ours(installed: Path, tmp_path: Path) -> None:
    """As where a project keeps its environment inside its own checkout."""
    git = ["git", "-C", installed.parent, "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    script = "from dpo4rec_ray.store import versions; print(repr(versions.commit()))"
    assert run([installed / "python", "-c", script], tmp_path) == "''\n"
    assert len(versions.commit()) == 40 or not (ROOT / ".git").exists()


@pytest.mark.ray
def test_a_stage_runs(installed: Path, tmp_path: Path) -> None:
    command = [installed / "dpo4rec", "run", "demo", "sample.num_users=60", "--only", "prepare"]
    assert "prepare(0): started" in run(command, tmp_path)
    assert (tmp_path / "runs" / "demo" / "data" / "lists" / "manifest.json").is_file()
    assert [file.name for file in tmp_path.iterdir()] == ["runs"]


@pytest.mark.ray
def test_workers_import_the_installed_package(installed: Path, tmp_path: Path) -> None:
    script = (
        "import ray\n"
        "from dpo4rec_ray.cli import session\n"
        "session.set_defaults(session.WORK_ENV)\n"
        "session.start_ray(False)\n"
        "def where():\n"
        "    import dpo4rec_ray\n"
        "    return dpo4rec_ray.__file__\n"
        "print(ray.get(ray.remote(where).remote()))"
    )
    found = run([installed / "python", "-c", script], tmp_path).strip()
    assert Path(found).is_relative_to(installed.parent)
