"""Texts for users whom no version knows: the files, and the jobs for what is missing."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo4rec_ray.config.serving import ServingSection
from dpo4rec_ray.serving import fresh_texts
from dpo4rec_ray.serving.api import Event
from dpo4rec_ray.serving.fresh_texts import FreshText, FreshTextLookup, FreshTextStore, TextJob
from dpo4rec_ray.serving.loaded_version import NEUTRAL_RATING
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.version_files import VersionFiles
from tests.conftest import ROOT

DAY = 86_400.0


def written(text: str = "likes comedies", value: float = 0.5, dim: int = 4) -> FreshText:
    return FreshText(text, np.full(dim, value, np.float32))


def new_store(folder: Path, **settings: float) -> FreshTextStore:
    """settings: keys of [serving]."""
    return FreshTextStore(folder, ServingSection(**settings))


def files(folder: Path) -> list[Path]:
    return [file for file in (folder / "fresh").rglob("*") if file.is_file()]


def test_what_one_process_writes_another_reads(tmp_path: Path) -> None:
    vector = np.random.default_rng(0).normal(size=384).astype(np.float32)
    new_store(tmp_path).write("v1", "ann", FreshText("likes comedies", vector), "minilm")
    other = new_store(tmp_path)
    found = other.read("v1", "ann")
    assert found is not None and found.text == "likes comedies"
    assert np.array_equal(found.vector, vector) and found.vector.dtype == np.float32
    assert other.read("v1", "Ann") is None and other.read("v2", "ann") is None
    (file,) = files(tmp_path)
    assert json.loads(file.read_text())["encoder"] == "minilm"
    assert b"ann" not in file.read_bytes(), "who it is about is not to be read from the file"


def test_a_text_that_is_too_old_counts_as_none(tmp_path: Path) -> None:
    store = new_store(tmp_path, fresh_ttl_s=100)
    store.write("v1", "ann", written(), "minilm")
    (file,) = files(tmp_path)
    stored = json.loads(file.read_text())
    for age, there in ((50, True), (150, False)):
        file.write_text(json.dumps(stored | {"written": time.time() - age}))
        assert (store.read("v1", "ann") is not None) is there


def test_a_sweep_removes_what_is_too_old_and_what_a_crash_left(tmp_path: Path) -> None:
    store = new_store(tmp_path, fresh_ttl_s=100)
    for user in ("old", "new"):
        store.write("v1", user, written(), "minilm")
    half = store.file("v1", "half").with_suffix(".tmp123")
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_text("{")
    for file in (store.file("v1", "old"), half):
        os.utime(file, (0, time.time() - 150))
    assert store.sweep() == 1
    assert files(tmp_path) == [store.file("v1", "new")]


def test_there_are_never_more_files_than_the_bound_and_the_oldest_go(tmp_path: Path) -> None:
    store = new_store(tmp_path, fresh_max_users=10)
    for number in range(35):
        store.write(f"v{number % 2}", f"user {number}", written(), "minilm")
        os.utime(store.file(f"v{number % 2}", f"user {number}"), (0, time.time() - 100 + number))
        assert len(files(tmp_path)) <= 10
    stay = [number for number in range(35) if store.read(f"v{number % 2}", f"user {number}")]
    assert len(stay) > 5 and stay == list(range(stay[0], 35))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"text": "x", "vector": [1, 2]}',
        b'{"text": null, "vector": [1, 2], "written": 9e9}',
        b'{"text": "x", "vector": [1, [2]], "written": 9e9}',
        b'{"text": "x", "vector": [[1, 2]], "written": 9e9}',
        b'{"text": "x", "vector": [1, null], "written": 9e9}',
        b'{"text": "x", "vector": [1, NaN], "written": 9e9}',
        b'{"text": "x", "vector": [1, 1e400], "written": 9e9}',
        b'{"text": "x", "vector": [1, 1%s], "written": 9e9}' % (b"0" * 400),
        b'{"text": "x", "vector": "12", "written": 9e9}',
        b'{"text": "x", "vector": [1, 2], "written": "yesterday"}',
        None,
    ],
)
def test_a_damaged_file_counts_as_none_and_is_written_again(tmp_path: Path, content: bytes | None) -> None:
    store = new_store(tmp_path)
    file = store.file("v1", "ann")
    file.parent.mkdir(parents=True)
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    assert store.read("v1", "ann") is None and store.find("v1", "ann") is None
    if content is not None:
        store.write("v1", "ann", written(), "minilm")
        assert store.read("v1", "ann") is not None


HOSTILE = [
    "../../../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/b",
    "a\x00b",
    "\ud800",
    "x" * 5000,
    "CON",
    "\u00e9",
    "e\u0301",
]


@pytest.mark.parametrize("user_id", HOSTILE)
def test_a_user_id_is_no_path(tmp_path: Path, user_id: str) -> None:
    store = new_store(tmp_path)
    store.write("v1", user_id, written(user_id.encode("ascii", "replace").decode()), "minilm")
    (file,) = files(tmp_path)
    assert file == store.file("v1", user_id)
    assert file.resolve().is_relative_to(tmp_path.resolve() / "fresh" / "v1")
    assert store.read("v1", user_id) is not None
    assert [store.read("v1", other) for other in HOSTILE if other != user_id] == [None] * (len(HOSTILE) - 1)


@given(one=st.text(), other=st.text())
def test_every_user_has_a_file_of_its_own(one: str, other: str) -> None:
    store = new_store(Path("registry"))
    assert (store.file("v1", one) == store.file("v1", other)) == (one == other)
    assert ".." not in store.file("v1", one).parts


def test_a_reader_never_sees_half_of_a_text(tmp_path: Path) -> None:
    """Two processes write texts of the same user again and again, while this one reads."""
    script = (
        "import sys; import numpy as np; from pathlib import Path\n"
        "from dpo4rec_ray.config.serving import ServingSection\n"
        "from dpo4rec_ray.serving.fresh_texts import FreshText, FreshTextStore\n"
        "store, digit = FreshTextStore(Path(sys.argv[1]), ServingSection()), sys.argv[2]\n"
        "print('begin', flush=True)\n"
        "for length in range(1, 150): store.write('v1', 'ann', FreshText(digit * length, np.full(500, int(digit))), 'e')\n"
    )
    store = new_store(tmp_path)
    store.write("v1", "ann", FreshText("1", np.full(500, 1, np.float32)), "e")
    writers = [
        subprocess.Popen([sys.executable, "-c", script, tmp_path, digit], cwd=ROOT, stdout=subprocess.PIPE)
        for digit in "12"
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == b"begin\n"
    seen = set()
    while any(writer.poll() is None for writer in writers):
        found = store.read("v1", "ann")
        assert found is not None and len(set(found.text)) == 1, found
        assert set(found.vector.tolist()) == {float(found.text[0])}, "text and vector of two writers"
        seen.add(found.text)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(seen) > 1, "nothing was read while they wrote"
    assert len(files(tmp_path)) == 1, "a temporary file stayed"


def test_memory_is_asked_before_the_disk_and_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh_texts, "MAX_CACHED", 2)
    monkeypatch.setattr(fresh_texts, "LOOK_AGAIN_S", 0.0)
    store = new_store(tmp_path)
    assert store.find("v1", "a") is None
    for user in "abc":
        store.write("v1", user, written(user), "minilm")
    assert store.find("v1", "a") is not None, "what was missing is looked for again"
    for user in "abc":
        store.find("v1", user)
        store.file("v1", user).unlink()
    assert [user for user in "bca" if store.find("v1", user)] == ["b", "c"]
    assert store.read("v1", "b") is None


def test_a_miss_is_believed_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_texts, "LOOK_AGAIN_S", DAY)
    store = new_store(tmp_path)
    assert store.find("v1", "a") is None
    new_store(tmp_path).write("v1", "a", written(), "minilm")
    assert store.find("v1", "a") is None and store.read("v1", "a") is not None


class Submitted(list[TextJob]):
    """The jobs of a replica."""

    def texts(self, folder: Path, retry_s: float = DAY) -> FreshTextLookup:
        return FreshTextLookup(new_store(folder), self.append, retry_s)


def events(version: VersionFiles, rows: list[int], ratings: list[float | None]) -> list[Event]:
    return [
        Event(item_id=version.item_id(row), rating=rating) for row, rating in zip(rows, ratings, strict=True)
    ]


def find(
    texts: FreshTextLookup, version: VersionFiles, user_id: str, history: list[Event]
) -> FreshText | None:
    return asyncio.run(texts.find(version, user_id, history))


@pytest.fixture
def version(published: Registry) -> VersionFiles:
    return VersionFiles(published.folder("v1"))


def test_a_user_gets_one_job(version: VersionFiles, tmp_path: Path) -> None:
    jobs = Submitted()
    texts = jobs.texts(tmp_path)
    history = [*events(version, [3, 5], [4.0, 2.0]), Event(item_id="no such item", rating=1.0)]
    for _ in range(50):
        assert find(texts, version, "ann", history) is None
    assert jobs == [TextJob("v1", "ann", [3, 5], [4.0, 2.0])]
    find(texts, version, "bob", history)
    assert [one.user_id for one in jobs] == ["ann", "bob"]


def test_a_user_without_a_text_gets_another_job_later(version: VersionFiles, tmp_path: Path) -> None:
    jobs = Submitted()
    texts = jobs.texts(tmp_path, retry_s=0.0)
    for _ in range(3):
        find(texts, version, "ann", events(version, [3], [4.0]))
    assert len(jobs) == 3


def test_without_a_known_item_no_job_is_submitted(version: VersionFiles, tmp_path: Path) -> None:
    jobs = Submitted()
    texts = jobs.texts(tmp_path)
    find(texts, version, "ann", [])
    find(texts, version, "ann", [Event(item_id="no such item", rating=1.0)])
    assert not jobs
    find(texts, version, "ann", events(version, [3], [4.0]))
    assert len(jobs) == 1, "a later request brings more"


def test_one_missing_rating_makes_all_neutral(version: VersionFiles, tmp_path: Path) -> None:
    jobs = Submitted()
    find(jobs.texts(tmp_path), version, "ann", events(version, [3, 5], [5.0, None]))
    assert jobs[0].ratings == [NEUTRAL_RATING] * 2


def test_what_is_written_is_used_if_its_vector_fits(version: VersionFiles, tmp_path: Path) -> None:
    jobs = Submitted()
    history = events(version, [3], [4.0])
    store = new_store(tmp_path)
    store.write("v1", "ann", written(dim=version.vector_dim), "minilm")
    found = find(jobs.texts(tmp_path), version, "ann", history)
    assert found is not None and found.text == "likes comedies" and not jobs
    store.write("v1", "ann", written(dim=version.vector_dim + 1), "another")
    assert find(jobs.texts(tmp_path), version, "ann", history) is None and len(jobs) == 1


def test_a_replica_remembers_a_bounded_number_of_jobs(
    version: VersionFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh_texts, "MAX_SUBMITTED", 2)
    jobs = Submitted()
    texts = jobs.texts(tmp_path)
    for user in "abcca":
        find(texts, version, user, events(version, [3], [4.0]))
    assert [one.user_id for one in jobs] == ["a", "b", "c", "a"]


def test_a_burst_of_new_users_is_no_store_that_hangs(
    version: VersionFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who only waited for a thread says nothing about the store: all get their jobs."""
    monkeypatch.setattr(fresh_texts, "READERS", 2)
    monkeypatch.setattr(fresh_texts, "MAX_READ_S", 5.0)

    def read(*_: object) -> None:
        time.sleep(0.02)

    monkeypatch.setattr(FreshTextStore, "_read", read)
    jobs = Submitted()
    texts = jobs.texts(tmp_path)
    history = events(version, [3], [4.0])

    async def ask() -> None:
        await asyncio.gather(*(texts.find(version, f"user {number}", history) for number in range(40)))

    asyncio.run(ask())
    assert len(jobs) == 40


def test_what_cannot_be_removed_stops_no_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = new_store(tmp_path, fresh_ttl_s=100)
    for user in ("old", "older", "new"):
        store.write("v1", user, written(), "minilm")
    for user in ("old", "older"):
        os.utime(store.file("v1", user), (0, time.time() - 150))
    real, kept = Path.unlink, store.file("v1", "old")

    def unlink(file: Path, missing_ok: bool = False) -> None:
        if file == kept:
            raise PermissionError(file)
        real(file, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    store.sweep()
    assert sorted(files(tmp_path)) == sorted([kept, store.file("v1", "new")])


def test_a_store_that_hangs_is_not_waited_for(
    version: VersionFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by who asks for a text, nor by what else runs in threads; and it is not asked again at once."""
    answered, asked = threading.Event(), list[str]()

    def read(_: object, version: str, user_id: str) -> None:
        asked.append(user_id)
        answered.wait(30)

    monkeypatch.setattr(FreshTextStore, "_read", read)
    texts = Submitted().texts(tmp_path)

    async def ask() -> None:
        began = time.monotonic()
        found = await asyncio.gather(*(texts.find(version, f"user {number}", []) for number in range(40)))
        assert found == [None] * 40
        assert await texts.find(version, "later", []) is None
        assert await asyncio.to_thread(lambda: "other work") == "other work"
        assert time.monotonic() - began < 5
        answered.set()

    asyncio.run(ask())
    assert "later" not in asked


def test_slow_storage_holds_nobody_else_up(
    version: VersionFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, answered = threading.Event(), threading.Event()

    def read(*_: object) -> None:
        reading.set()
        assert answered.wait(30), "the loop waits for the file"

    monkeypatch.setattr(FreshTextStore, "_read", read)

    async def ask() -> None:
        slow = asyncio.create_task(Submitted().texts(tmp_path).find(version, "ann", []))
        while not reading.is_set():
            await asyncio.sleep(0.001)
        answered.set()  # by the same loop, while the file is read
        assert await slow is None

    asyncio.run(ask())
