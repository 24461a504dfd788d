"""What a store does that fails, breaks off, answers late or is read while it is written: nothing is lost or taken for empty."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo4rec_ray.config import load_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.storage import lease as leases
from dpo4rec_ray.storage.lease import FOLDER, Held, Holder, lease
from dpo4rec_ray.storage.local_copies import local_copy
from dpo4rec_ray.storage.places import create, download, place, remove, write_text, written_at
from dpo4rec_ray.workers.shards import resume_parts
from tests.odd_store import OddStore, Request, odd_store

PARTS = [f"part-{number:05d}.parquet" for number in range(5)]


@pytest.fixture
def store() -> Iterator[OddStore]:
    with odd_store() as found:
        yield found


@pytest.mark.parametrize("how", ["breaks off", "is refused"])
@pytest.mark.parametrize("number", range(6))
def test_a_listing_that_fails_is_no_empty_folder(store: OddStore, number: int, how: str) -> None:
    """The parts of a run that goes on were removed, as if there were none."""
    folder = place("s3://bucket/run/generations")
    write_text(folder / "shards.fingerprint", "F")
    for name in PARTS:
        write_text(folder / name, "rows")
    before, listings = dict(store.objects), list[str]()

    def hook(request: Request) -> bool:
        if request.is_listing:
            listings.append(request.path)
        if not request.is_listing or len(listings) != number + 1:
            return False
        request.break_off() if how == "breaks off" else request.answer(403)
        return True

    store.hook = hook
    if how == "breaks off":
        assert resume_parts(folder, "F") == set(range(5))
    elif number < len(listings):
        with pytest.raises(OSError, match="403"):
            resume_parts(folder, "F")
    assert store.objects == before


@pytest.mark.parametrize("number", range(4))
def test_a_copy_is_whole(
    store: OddStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("card.json", "reranker/model.safetensors"):
        write_text(place("s3://bucket/v1") / name, name)
    listings = iter(range(9))

    def hook(request: Request) -> bool:
        if breaks := request.is_listing and next(listings) == number:
            request.break_off()
        return breaks

    store.hook = hook
    copy = local_copy("s3://bucket/v1")
    assert (copy / "reranker" / "model.safetensors").read_text() == "reranker/model.safetensors"
    assert (copy / "card.json").is_file()


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_what_is_removed_is_gone_when_it_is_said(store: OddStore, scheme: str) -> None:
    """Google's store answers 404 of a folder, which is no object there; the other removals then went on behind the caller."""
    store.strict = scheme == "gs"

    def slow(request: Request) -> bool:
        if request.command == "DELETE" and request.key in store.objects:
            time.sleep(0.2)
        return False

    store.hook = slow
    folder = place(f"{scheme}://bucket/run/scores")
    for name in (*PARTS, "failed/part-00000.parquet"):
        store.objects[f"bucket/run/scores/{name}"] = b"rows"
    remove(folder)
    assert store.objects == {}
    remove(folder)  # what is not there is no error
    write_text(folder / PARTS[0], "new")
    time.sleep(0.5)
    assert store.objects == {f"bucket/run/scores/{PARTS[0]}": b"new"}


def test_a_lease_that_grows_while_it_is_read_is_held(
    store: OddStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From beat 9 to 10 between two requests of a reader: what it read was cut off, and counted as nobody's."""
    monkeypatch.setattr(leases, "POLL_S", 0.02)
    holder = Holder("far", 1, "another kernel", 1.0, token="t", beats=9)
    file = place("s3://bucket/run") / FOLDER / "000001.json"
    write_text(file, json.dumps(holder.__dict__))

    def grows(request: Request) -> bool:
        if request.command in ("GET", "HEAD") and request.key in store.objects:
            store.do(request)
            stored = json.loads(store.objects[request.key])
            store.objects[request.key] = json.dumps(stored | {"beats": stored["beats"] + 1}).encode()
            return True
        return False

    store.hook = grows
    with pytest.raises(Held, match="on far"), lease(place("s3://bucket/run"), lost=lambda: None):
        pass


def test_a_lease_that_cannot_be_read_is_nobodys_only_after_a_while(
    store: OddStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "POLL_S", 0.05)
    monkeypatch.setattr(leases, "GONE_AFTER_S", 1.0)
    write_text(place("s3://bucket/run") / FOLDER / "000001.json", '{"host": "fa')
    began = time.monotonic()
    with lease(place("s3://bucket/run"), lost=lambda: None):
        assert time.monotonic() - began > 0.9


@pytest.mark.parametrize("answer", ["503", "none"])
def test_who_created_a_file_knows_it_although_the_answer_was_lost(store: OddStore, answer: str) -> None:
    """The request is made again, and then there is a file: one's own. A job waited for itself."""
    lost = iter([True])

    def hook(request: Request) -> bool:
        if request.headers.get("If-None-Match") != "*" or not next(lost, False):
            return False
        store.objects[request.key] = request.body
        if answer == "503":
            request.answer(503)
        else:
            request.close_connection = True
        return True

    store.hook = hook
    folder = place("s3://bucket/run")
    with lease(folder, lost=lambda: None):
        assert not create(folder / FOLDER / "000001.json", b"another's")


def test_a_file_that_goes_while_its_creator_looks_was_anothers(store: OddStore) -> None:
    folder = place("s3://bucket/run")
    write_text(folder / "1.json", "another's")

    def goes(request: Request) -> bool:
        if request.command == "GET":
            store.objects.pop(request.key, None)
        return False

    store.hook = goes
    assert not create(folder / "1.json", b"mine")


def test_a_lease_of_other_code_is_held_while_it_changes(
    store: OddStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of the version before is at work on the run."""
    monkeypatch.setattr(leases, "POLL_S", 0.05)
    file = place("s3://bucket/run") / FOLDER / "000001.json"
    stop = threading.Event()

    def beat() -> None:
        beats = 0
        while not stop.wait(0.1):
            beats += 1
            write_text(file, json.dumps({"host": "far", "started": 1.0, "beats": beats}))

    write_text(file, "{}")
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(Held, match="cannot be told"), lease(place("s3://bucket/run"), lost=lambda: None):
            pass
    finally:
        stop.set()
        thread.join()


def test_a_large_object_is_never_in_memory_as_a_whole(store: OddStore, tmp_path: Path) -> None:
    store.objects["bucket/model/weights"] = bytes(300 * 2**20)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        before, after = pool.apply(peaks, ("s3://bucket/model", str(tmp_path / "copy")))
    assert (tmp_path / "copy" / "weights").stat().st_size == 300 * 2**20
    assert after - before < 120


def peaks(source: str, target: str) -> tuple[float, float]:
    """MiB of this process at most, before and after a copy."""
    import resource

    _ = place(source).is_dir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    download(place(source), Path(target))
    return before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.slow
def test_a_store_that_is_silent_for_longer_than_a_request_waits(store: OddStore) -> None:
    """obstore gives up what changes something after 30 s."""
    folder = place("s3://bucket/run")
    write_text(folder / "a", "a")
    until = time.monotonic() + 35

    def silent(request: Request) -> bool:
        if (wait := until - time.monotonic()) > 0:
            time.sleep(wait)
            request.close_connection = True
            return True
        return False

    store.hook = silent
    made: list[bool] = []
    threads = [
        threading.Thread(target=(folder / "a").unlink),
        threading.Thread(target=lambda: made.append(create(folder / "b", b"mine"))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert store.objects == {"bucket/run/b": b"mine"} and made == [True]


def test_times_come_with_the_listing(store: OddStore, tmp_path: Path) -> None:
    """A sweep of many files asked for each of them."""
    folder = place("s3://bucket/fresh")
    for number in range(30):
        write_text(folder / f"v{number % 3}" / "ab" / f"{number}.json", "{}")
    asked: list[str] = []
    store.hook = lambda request: bool(asked.append(f"{request.command} {request.path}"))
    found = written_at(folder)
    assert len(found) == 30 and len(asked) == 1
    assert {file.read_text() for file in found} == {"{}"} and set(found.values()) == {1767225600.0}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("")
    assert list(written_at(tmp_path)) == [tmp_path / "a" / "b"] and written_at(folder / "none") == {}


@pytest.mark.parametrize("name", ["run[1]", "a*", "what?"])
def test_a_pattern_is_no_name(store: OddStore, name: str) -> None:
    """glob and rm of object stores would take it for one."""
    with pytest.raises(UserError, match="patterns in object stores"):
        place(f"s3://bucket/{name}/x")
    assert place(f"/tmp/{name}") == Path("/tmp").resolve() / name
    assert load_config("demo", [f"run.name={name}"]).run.name == name, "on a disk it is a name"
    with pytest.raises(UserError, match="patterns in object stores"):
        load_config("demo", [f"run.name={name}", "run.root=s3://bucket"])


def test_a_clock_that_is_set_makes_nobody_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    psutil_linux = pytest.importorskip("psutil._pslinux")
    with lease(tmp_path, lost=lambda: None):
        began = psutil_linux.boot_time()
        monkeypatch.setattr(psutil_linux, "boot_time", lambda: began + 5)
        monkeypatch.setattr(psutil_linux, "BOOT_TIME", began + 5, raising=False)
        with pytest.raises(Held, match=f"process {os.getpid()} "), lease(tmp_path, lost=lambda: None):
            pass
