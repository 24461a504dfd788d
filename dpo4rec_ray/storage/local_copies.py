"""Copies of remote folders and files on this machine's disk, for what has to read local files: weights, tokenizers, tables.

A copy is made once per node and content, by whichever process needs it first; the others wait for it. The oldest unused ones
go when all together would take more than DPO4REC_CACHE_GIB.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.storage.places import described, download, is_remote, objects, place, remove, size_of

BOUND = "DPO4REC_CACHE_GIB"
DEFAULT_BOUND_GIB = 100.0
# A copy that was asked for within this time may not be open yet. (What is open outlives its removal.)
IN_USE_S = 3600.0


def cache_root() -> Path:
    """What belongs to this machine's user: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo4rec_ray"


def local_copy(where: str | Path) -> Path:
    """A local path with the content of a place: the place itself where it is local, else a copy of what is there now.

    Raises:
        FileNotFoundError: there is nothing at a remote place.
        UserError: the cache's bound is no number.
    """
    source = place(where)
    if not is_remote(source):
        return source
    found = objects(source)
    key = hashlib.sha256("\n".join([str(source), *described(found)]).encode()).hexdigest()[:24]
    entry = cache_root() / "copies" / key
    target = entry / source.name
    with alone(entry):
        if not target.exists():
            _make_room(entry.parent, sum(info.get("size") or 0 for info in found.values()))
            temporary = entry.with_name(f"{key}.tmp{os.getpid()}")
            remove(temporary)
            try:
                download(source, temporary / source.name)
                temporary.rename(entry)
            finally:
                remove(temporary)
        os.utime(entry)
    return target


@contextlib.contextmanager
def alone(entry: Path) -> Iterator[None]:
    """One process of this machine at a time for an entry of the cache; none waits where the file system has no locks."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with entry.with_name(f"{entry.name}.lock").open("w") as handle:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make_room(folder: Path, needed: int) -> None:
    """Remove the copies that were not asked for longest, until `needed` bytes more stay within the bound."""
    text = os.environ.get(BOUND, str(DEFAULT_BOUND_GIB))
    try:
        bound = float(text) * 2**30
    except ValueError:
        raise UserError(f"{BOUND} = {text!r} is no number of GiB") from None
    entries = sorted(
        (one for one in folder.iterdir() if one.is_dir() and ".tmp" not in one.name),
        key=lambda one: one.stat().st_mtime,
    )
    sizes = [size_of(one) for one in entries]
    total = sum(sizes) + needed
    for one, size in zip(entries, sizes, strict=True):
        if total <= bound or time.time() - one.stat().st_mtime < IN_USE_S:
            return
        remove(one)
        total -= size
