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


def test_a_second_job_is_refused_while_the_first_lives(root: Place) -> None:
    with lease(root, lost=never), pytest.raises(Held, match=r"process \d+ on "), lease(root, lost=never):
        pass
    with lease(root, lost=never):
        pass
    assert list((root / FOLDER).glob("*.json")) == []


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
