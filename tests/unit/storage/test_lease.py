"""One writer at a time: on a folder and on a real S3 server, with processes that live, end and are cut off."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dpo4rec_ray.storage import lease as module
from dpo4rec_ray.storage.lease import FOLDER, Held, Holder, lease
from dpo4rec_ray.storage.places import Place, place, write_text


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return tmp_path if request.param == "folder" else place(request.getfixturevalue("s3"))


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.2)
    monkeypatch.setattr(module, "GONE_AFTER_S", 1.0)
    monkeypatch.setattr(module, "POLL_S", 0.05)


def never() -> None:
    raise AssertionError("the lease was lost")


def elsewhere(root: Place, number: int = 1, beats: int = 0) -> Holder:
    """A holder on another machine writes its lease."""
    holder = replace(Holder.myself(), host="far", machine="another kernel", beats=beats)
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    write_text(root / FOLDER / f"{number:06d}.json", json.dumps(asdict(holder)))
    return holder


def is_free(root: Place) -> bool:
    """Whether the last holder let go, and left one file."""
    [file] = (root / FOLDER).glob("*.json")
    return json.loads(file.read_text())["ended"]


def test_a_second_job_is_refused_while_the_first_lives(root: Place) -> None:
    with lease(root, lost=never), pytest.raises(Held, match=r"process \d+ on "), lease(root, lost=never):
        pass
    with lease(root, lost=never):
        pass
    assert is_free(root)


def test_a_job_that_ended_without_a_word_is_followed_at_once(root: Place) -> None:
    code = (
        "import os, sys\nfrom dpo4rec_ray.storage.lease import lease\nfrom dpo4rec_ray.storage.places import place\n"
        "with lease(place(sys.argv[1]), lost=lambda: None): os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(root)], check=False)
    assert len(list((root / FOLDER).glob("*.json"))) == 1
    told: list[str] = []
    with lease(root, lost=never, waiting=told.append):
        assert not told


def test_a_holder_elsewhere_is_believed_while_it_changes(root: Place) -> None:
    holder = elsewhere(root)
    stop = threading.Event()

    def beat() -> None:
        beats = 0
        while not stop.wait(0.2):
            beats += 1
            write_text(root / FOLDER / "000001.json", json.dumps(asdict(replace(holder, beats=beats))))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(Held, match="on far"), lease(root, lost=never):
            pass
    finally:
        stop.set()
        thread.join()


def test_a_holder_elsewhere_that_says_nothing_is_followed_after_a_while(root: Place) -> None:
    elsewhere(root, number=7)
    told: list[str] = []
    began = time.monotonic()
    with lease(root, lost=never, waiting=told.append):
        assert time.monotonic() - began > 0.9 and len(told) == 1 and "far" in told[0]
        assert [file.name for file in (root / FOLDER).glob("*.json")] == ["000008.json"]


@pytest.mark.parametrize("how", ["a higher number", "its own file gone"])
def test_a_holder_that_was_taken_over_learns_of_it(root: Place, how: str) -> None:
    lost = threading.Event()
    with lease(root, lost=lost.set):
        if how == "a higher number":
            elsewhere(root, number=2)
        else:
            (root / FOLDER / "000001.json").unlink()
        assert lost.wait(10)
    # and does not remove what is the other's
    assert len(list((root / FOLDER).glob("*.json"))) == (2 if how == "a higher number" else 0)


def test_who_waits_gets_it_next(root: Place) -> None:
    order: list[int] = []

    def work(number: int) -> None:
        with lease(root, lost=never, wait=True):
            order.append(number)
            time.sleep(0.1)
            order.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(order) == 8 and all(order[i] == order[i + 1] for i in range(0, 8, 2))


def test_a_slow_taker_of_a_number_that_was_used_does_not_hold(
    root: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees number 1 let go; before it creates number 2, others take 2 and 3 and the third holds."""
    with lease(root, lost=never):
        pass
    real, order = module.create, list[str]()

    def late(file: Place, content: bytes) -> bool:
        monkeypatch.setattr(module, "create", real)
        with lease(root, lost=never):
            pass
        holding.__enter__()
        order.append("the third holds")
        threading.Timer(1.0, let_go).start()
        return real(file, content)

    def let_go() -> None:
        order.append("the third lets go")
        holding.__exit__(None, None, None)

    holding = lease(root, lost=never)
    monkeypatch.setattr(module, "create", late)
    with lease(root, lost=never, wait=True):
        order.append("the slow one holds")
    assert order == ["the third holds", "the third lets go", "the slow one holds"]
    assert is_free(root)


def test_a_folder_that_empties_while_it_is_listed_is_empty(
    root: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec asks once more for what it just saw."""
    file = root / "folder" / "1.json"
    file.parent.mkdir(parents=True)
    write_text(file, "{}")
    if isinstance(root, Path):
        file.unlink()
    else:
        system = root.fs
        seen = system._isdir

        async def emptied(path: str) -> bool:
            found = await seen(path)
            await system._rm_file(path + "/1.json")
            return found

        monkeypatch.setattr(system, "_isdir", emptied)
    assert list((root / "folder").glob("*.json")) == []
