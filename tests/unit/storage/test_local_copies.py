"""The node's cache between processes: killed ones leave nothing for good, and nobody is given what another one removes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from dpo4rec_ray.storage import local_copies
from dpo4rec_ray.storage.local_copies import BOUND, IN_USE_S, UNFINISHED, alone, cache_root, local_copy
from dpo4rec_ray.storage.places import place, write_bytes

SIZE = 60_000
ONE_COPY = str(1.5 * SIZE / 2**30)


@pytest.fixture(autouse=True)
def cache(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """There is room for one copy; the store has the models a, b and c."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(BOUND, ONE_COPY)
    for name in "abc":
        write_bytes(place(s3) / name / "weights", name.encode() * SIZE)
    return cache_root() / "copies"


def age(copy: Path) -> Path:
    """As if it had not been asked for since a while."""
    entry = copy.parent
    os.utime(entry, (0, time.time() - IN_USE_S - 60))
    return entry


def folders(cache: Path) -> list[str]:
    return sorted(one.name for one in cache.iterdir() if one.is_dir())


def killed_in_a_copy(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(_source: object, _found: object, target: Path) -> None:
        target.mkdir(parents=True)
        (target / "weights").write_bytes(b"?" * SIZE)
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if not pid:
        monkeypatch.setattr(local_copies, "fetch", die)
        monkeypatch.setattr(local_copies, "objects", lambda _: {"weights": {"size": SIZE}})
        local_copy(source)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_what_a_killed_copy_left_goes_with_the_next_one(
    s3: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_copies, "described", lambda _: ["the same"])
    killed_in_a_copy(f"{s3}/a", monkeypatch)
    assert len(folders(cache)) == 1
    copy = local_copy(f"{s3}/a")
    assert folders(cache) == [copy.parent.name] and (copy / "weights").read_bytes() == b"a" * SIZE


def test_what_a_killed_copy_left_makes_room_for_others(
    s3: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_in_a_copy(f"{s3}/a", monkeypatch)
    copy = local_copy(f"{s3}/b")
    assert folders(cache) == [copy.parent.name]


def test_a_copy_that_is_being_made_is_nobodys_to_remove(s3: str, cache: Path) -> None:
    made = cache / f"{'0' * 24}{UNFINISHED}"
    made.mkdir(parents=True)
    (made / "weights").write_bytes(b"0" * SIZE)
    with alone(made.with_name("0" * 24)):
        copy = local_copy(f"{s3}/a")
    assert folders(cache) == sorted([made.name, copy.parent.name])


def test_copies_that_go_while_they_are_counted(s3: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = age(local_copy(f"{s3}/a"))
    real = local_copies.size_of

    def size_of(folder: Path) -> int:
        local_copies.remove(first)  # another process makes room
        return real(folder)

    monkeypatch.setattr(local_copies, "size_of", size_of)
    assert (local_copy(f"{s3}/b") / "weights").is_file()


def test_nobody_is_given_a_copy_of_which_files_are_removed(
    s3: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = age(local_copy(f"{s3}/a"))
    real, there = local_copies.remove, list[bool]()

    def remove(folder: Path) -> None:
        if folder.exists():
            there.append(entry.exists())
        real(folder)

    monkeypatch.setattr(local_copies, "remove", remove)
    local_copy(f"{s3}/b")
    assert there == [False], "whoever asks meanwhile finds no copy, and makes one"
    assert not entry.exists()
    monkeypatch.setattr(local_copies, "remove", real)
    assert (local_copy(f"{s3}/a") / "weights").read_bytes() == b"a" * SIZE


def test_a_copy_in_use_stays(s3: str, cache: Path) -> None:
    names = [local_copy(f"{s3}/{name}").parent.name for name in "abc"]
    assert folders(cache) == sorted(names)
