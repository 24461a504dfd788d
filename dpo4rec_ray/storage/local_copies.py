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
from dpo4rec_ray.storage.places import described, fetch, is_remote, objects, place, remove, size_of

BOUND = "DPO4REC_CACHE_GIB"
DEFAULT_BOUND_GIB = 100.0
# A copy that was asked for within this time may not be open yet. (What is open outlives its removal.)
IN_USE_S = 3600.0
UNFINISHED = ".tmp"  # ends the name of a copy that is being made or removed, under its entry's lock


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
            temporary = entry.with_name(f"{key}{UNFINISHED}")
            remove(temporary)  # of a process that was killed
            _make_room(entry.parent, sum(info.get("size") or 0 for info in found.values()), entry)
            try:
                fetch(source, found, temporary / source.name)
                temporary.rename(entry)
            finally:
                remove(temporary)
        os.utime(entry)
    return target


@contextlib.contextmanager
def alone(entry: Path, *, wait: bool = True) -> Iterator[bool]:
    """One process of this machine at a time for an entry of the cache; none waits where the file system has no locks.

    wait: for another process that has it; else False is what the block is given.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    with entry.with_name(f"{entry.name}.lock").open("w") as handle:
        free = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            free = False
        except OSError:  # no locks here
            pass
        yield free


def _make_room(folder: Path, needed: int, own: Path) -> None:
    """Remove the copies that were not asked for longest, until `needed` bytes more stay within the bound.

    own: the entry that this process has to itself.
    """
    text = os.environ.get(BOUND, str(DEFAULT_BOUND_GIB))
    try:
        bound = float(text) * 2**30
    except ValueError:
        raise UserError(f"{BOUND} = {text!r} is no number of GiB") from None
    found: list[tuple[float, int, Path]] = []
    for one in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # other processes make room too
            if one.is_dir():
                found.append((one.stat().st_mtime, size_of(one), one))
    total = sum(size for _, size, _ in found) + needed
    for _, size, one in sorted(found):
        if total <= bound:
            return
        entry = one.with_name(one.name.removesuffix(UNFINISHED))
        if entry == own:
            continue
        with alone(entry, wait=False) as free:
            # An unfinished one that nobody is at was left by a process that was killed.
            if free and (one != entry or _not_in_use(one)):
                if one == entry:  # at once, so that nobody is given a part of it
                    one = one.rename(one.with_name(f"{one.name}{UNFINISHED}"))
                remove(one)
                total -= size


def _not_in_use(entry: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return time.time() - entry.stat().st_mtime >= IN_USE_S
    return False
