"""Signs of life: what is open, which stage it belongs to, and how the work ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo4rec_ray.store import events, heartbeat
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.heartbeat import Heartbeat, beating, read_heartbeat
from dpo4rec_ray.store.progress import Progress


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.02)


def seen(store: RunDir, condition: Callable[[Heartbeat], bool]) -> Heartbeat:
    """The first heartbeat that meets it."""
    for _ in range(500):
        beat = read_heartbeat(store)
        if beat and condition(beat):
            return beat
        time.sleep(0.02)
    raise AssertionError(read_heartbeat(store))


def test_a_heartbeat_has_what_is_open(tmp_path: Path) -> None:
    store = RunDir(tmp_path)
    log = events.EventLog(store)
    with beating(store, log):
        log.stage, log.round = "generate", 1
        with Progress("generate", 100, "users", already=10) as progress:
            progress.starting = lambda: "1 importing vLLM"
            beat = seen(store, lambda beat: bool(beat.progress))
            assert (beat.stage, beat.round, beat.ended) == ("generate", 1, "")
            assert beat.time - beat.stage_began < 5
            (one,) = beat.progress
            assert (one["done"], one["total"], one["rate"], one["left_s"]) == (10, 100, None, None)
            assert one["starting"] == "1 importing vLLM"
            progress.at(20)
            time.sleep(0.1)
            progress.at(60)  # 40 in 0.1 s; 40 more take as long
            (one,) = seen(store, lambda beat: beat.progress[0]["done"] == 60).progress
            assert 40 < one["rate"] <= 400 and one["left_s"] == pytest.approx(
                40 / one["rate"], rel=0.1, abs=0.06
            )
            assert one["starting"] == ""
        seen(store, lambda beat: beat.progress == [])
    assert seen(store, lambda beat: True).ended == "finished"


def test_the_last_one_says_how_it_ended(tmp_path: Path) -> None:
    store = RunDir(tmp_path)
    for error, ended in ((ValueError("no\nlines"), "failed: no"), (KeyboardInterrupt(), "interrupted")):
        with pytest.raises(type(error)), beating(store, events.EventLog(store)):
            raise error
        beat = read_heartbeat(store)
        assert beat is not None and beat.ended == ended


def test_storage_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise TimeoutError("503")

    monkeypatch.setattr(heartbeat, "write_json", broken)
    with beating(RunDir(tmp_path), events.EventLog(RunDir(tmp_path))):
        pass
    assert read_heartbeat(RunDir(tmp_path)) is None


def test_a_file_of_another_version_is_no_sign(tmp_path: Path) -> None:
    (tmp_path / heartbeat.HEARTBEAT).write_text('{"pulse": 60}')
    assert read_heartbeat(RunDir(tmp_path)) is None
