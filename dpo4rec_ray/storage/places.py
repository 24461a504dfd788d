"""Places: files and folders of a run, on a file system or an object store, written whole and removed whole."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from upath import UPath

from dpo4rec_ray.errors import UserError, first_line

# A pathlib.Path, or, with a scheme such as s3://, what has its methods (upath.UPath). The builtin open() and os do not take it:
# use its own methods and the functions of this package.
Place = Path

PATTERNS = ("*", "?", "[", "]")
_COMPLETE = ".complete"  # the last object of a folder that was written as a whole


def place(path: str | Path) -> Place:
    """The place of a local path (made absolute) or of a URI.

    Raises:
        UserError: an unknown scheme, a name that would be a pattern, or a store that cannot be set up.
    """
    if isinstance(path, UPath):
        return cast(Place, path)
    text = str(path)
    scheme, mark, rest = text.partition("://")
    if not mark:
        return Path(text).expanduser().resolve()
    if scheme in ("file", "local"):
        return Path(rest).resolve()
    if any(one in rest for one in PATTERNS):
        raise UserError(f"{text}: {' '.join(PATTERNS)} are patterns in object stores; use another name")
    try:
        found = UPath(text.rstrip("/"))
        _ = found.fs
    except Exception as error:  # each store's own errors, about settings that only the user has
        raise UserError(f"{text}: this store cannot be opened ({first_line(error)})") from None
    return cast(Place, found)


def is_remote(where: Place) -> bool:
    """Whether it lies in an object store, which knows no rename and no append."""
    return isinstance(where, UPath)


@contextlib.contextmanager
def new_file(target: Place, *, synced: bool = False) -> Iterator[Path]:
    """A local path where to write what becomes `target` at the end; after an error nothing is left.

    synced: the content is on the disk before the name, which must not outlive it when a machine goes down.
    """
    if is_remote(target):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / target.name
            yield temporary
            _fs(target).put_file(str(temporary), _inner(target))
        return
    temporary = target.with_suffix(f".tmp{os.getpid()}-{threading.get_ident()}")
    try:
        yield temporary
        if synced:
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Place) -> Iterator[Path]:
    """A local folder, not yet made, where to write what becomes the folder `target` at the end, in place of an older one.

    `is_complete` tells whether it came to that.
    """
    if is_remote(target):
        with tempfile.TemporaryDirectory() as parent:
            temporary = Path(parent) / target.name
            yield temporary
            copy_folder(temporary, target)
        return
    for left in target.parent.glob(f".{glob.escape(target.name)}.tmp*"):  # from writers that were killed
        remove(left)
    temporary = target.with_name(f".{target.name}.tmp{os.getpid()}")
    try:
        yield temporary
        remove(target)
        os.replace(temporary, target)
    finally:
        remove(temporary)


def is_complete(folder: Place) -> bool:
    """Whether `new_folder` or `copy_folder` came to its end."""
    return (folder / _COMPLETE).exists() if is_remote(folder) else folder.is_dir()


def copy_folder(source: Place, target: Place) -> None:
    """Copy a folder with all below it; what was at `target` goes. On an object store its last object says that it is complete."""
    remove(target)
    if not is_remote(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(source):
            download(source, target)
        else:
            shutil.copytree(source, target)
        return
    if is_remote(source):
        with tempfile.TemporaryDirectory() as parent:
            local = Path(parent) / "folder"
            download(source, local)
            copy_folder(local, target)
        return
    files = [file for file in sorted(source.rglob("*")) if file.is_file()]
    for file in files:
        _fs(target).put_file(str(file), f"{_inner(target)}/{file.relative_to(source).as_posix()}")
    (target / _COMPLETE).write_bytes(b"")


def link_folder(source: Place, target: Place) -> None:
    """Copy a folder of files that are never changed in place; what was at `target` goes.

    On one local file system the files are linked instead, which costs no space: the two folders are independent as long as files
    are replaced or removed as wholes, as `new_file` does.
    """
    if is_remote(source) or is_remote(target):
        copy_folder(source, target)
        return
    with new_folder(target) as temporary:
        shutil.copytree(source, temporary, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def download(source: Place, target: Path) -> None:
    """Copy a remote file or folder to a local path that is not there yet.

    Raises:
        FileNotFoundError: there is nothing at `source`.
    """
    fetch(source, objects(source), target)


def fetch(source: Place, found: dict[str, dict[str, Any]], target: Path) -> None:
    """Copy these `objects` of a remote place to a local path that is not there yet.

    Raises:
        FileNotFoundError: one of them is gone.
        OSError: one of them has changed since it was listed.
    """
    for name, info in found.items():
        file = target / name if name else target
        file.parent.mkdir(parents=True, exist_ok=True)
        _fs(source).get_file(f"{_inner(source)}/{name}".rstrip("/"), str(file))
        if info.get("size") not in (None, file.stat().st_size):  # a web server may not say it
            raise OSError(f"{source}/{name}: changed while it was copied; try again")


def objects(where: Place) -> dict[str, dict[str, Any]]:
    """All objects below a remote place: path below it ("" for the place itself) -> what the store says of it, in name order.

    Raises:
        FileNotFoundError: there are none.
    """
    inner = _inner(where).strip("/")
    found = _fs(where).find(_inner(where), detail=True)
    listed = {str(path).strip("/").removeprefix(inner).strip("/"): info for path, info in found.items()}
    listed.pop(_COMPLETE, None)
    if not listed:
        raise FileNotFoundError(str(where))
    return dict(sorted(listed.items()))


def written_at(folder: Place) -> dict[Place, float]:
    """When each file below a folder was written (time.time); those that go meanwhile are left out."""
    times: dict[Place, float] = {}
    if is_remote(folder):
        with contextlib.suppress(FileNotFoundError):
            for name, info in objects(folder).items():
                times[folder / name] = (info.get("last_modified") or info["created"]).timestamp()
        return times
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if file.is_file():
                times[file] = file.stat().st_mtime
    return times


def described(found: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each of these `objects`, which changes with its content: path, size, and the store's hash or time."""
    return [
        f"{name} {info.get('size')} {info.get('e_tag') or info.get('ETag') or info.get('last_modified')}"
        for name, info in found.items()
    ]


def size_of(folder: Place) -> int:
    """Bytes of all files below a folder."""
    if is_remote(folder):
        return sum(info.get("size") or 0 for info in objects(folder).values())
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def remove(where: Place) -> None:
    """Remove a file, or a folder with all below it, if it is there."""
    if is_remote(where):
        with contextlib.suppress(FileNotFoundError):
            _fs(where).rm(_inner(where), recursive=True)
    elif where.is_file():
        where.unlink(missing_ok=True)
    else:
        shutil.rmtree(where, ignore_errors=True)


def move_into(source: Place, target: Place) -> None:
    """Move what is directly in the folder `source` into the folder `target`."""
    if is_remote(source):
        for name in objects(source):
            _fs(source).mv(f"{_inner(source)}/{name}", f"{_inner(target)}/{name}")
    else:
        for file in source.iterdir():
            os.replace(file, target / file.name)


def below(path: str | None, folder: Place) -> str | None:
    """The part of a path or URI below a folder; None where it is not below it."""
    start = f"{folder}/"
    return path.removeprefix(start) if path and path.startswith(start) else None


def create(target: Place, content: bytes) -> bool:
    """Write a file that must be new, whole; False where there is one already. Of several writers one succeeds.

    content: no other writer's; it tells whose file it is where the store repeats a request.
    """
    if is_remote(target):
        try:
            _fs(target).pipe_file(_inner(target), content, mode="create")
        except FileExistsError:
            return False
        return True
    temporary = target.with_suffix(f".tmp{os.getpid()}-{threading.get_ident()}")
    temporary.write_bytes(content)
    try:
        os.link(temporary, target)  # unlike a rename it fails where there is one, on NFS too
    except FileExistsError:
        return temporary.stat().st_nlink > 1  # NFS may repeat a request whose answer was lost
    finally:
        temporary.unlink(missing_ok=True)
    return True


def write_text(target: Place, content: str, *, synced: bool = False) -> None:
    """Write a text file, whole; synced: as in `new_file`."""
    with new_file(target, synced=synced) as temporary:
        temporary.write_text(content, encoding="utf-8", newline="")


def write_bytes(target: Place, content: bytes) -> None:
    """Write a file, whole."""
    with new_file(target) as temporary:
        temporary.write_bytes(content)


def _fs(where: Place) -> Any:
    return cast(UPath, where).fs


def _inner(where: Place) -> str:
    return cast(UPath, where).path
