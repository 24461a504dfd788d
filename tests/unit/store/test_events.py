"""The event log: what a line holds, one file per driver, and storage that fails."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store import events
from dpo4rec_ray.store.artifacts import RunDir


@pytest.fixture
def store(tmp_path: Path) -> RunDir:
    (tmp_path / "demo").mkdir()
    return RunDir(tmp_path / "demo")


def test_a_line_says_when_what_and_where(store: RunDir) -> None:
    with events.recorded(store):
        events.entered("generate", 2)
        events.note("worker_restarted", node="gpu-3", worker="gpu-3-77")
    started, restarted, finished = events.read_events(store)
    assert [line["event"] for line in (started, finished)] == ["run_started", "run_finished"]
    assert restarted.pop("time") >= started["time"]
    assert restarted == {
        "event": "worker_restarted", "run": "demo", "stage": "generate", "round": 2,
        "node": "gpu-3", "pid": os.getpid(), "worker": "gpu-3-77",
    }  # fmt: skip
    assert started["node"] == socket.gethostname()


def test_every_event_is_there_at_once(store: RunDir) -> None:
    """A driver that is killed later takes nothing along."""
    with events.recorded(store):
        for number in range(1, 4):
            events.note("stage_kept", number=number)
            assert len(events.read_events(store)) == 1 + number


def test_the_end_says_why(store: RunDir) -> None:
    with pytest.raises(UserError), events.recorded(store):
        raise UserError("no such file\nand more")
    last = events.read_events(store)[-1]
    assert (last["event"], last["error"]) == ("run_failed", "no such file")
    with pytest.raises(KeyboardInterrupt), events.recorded(store):
        raise KeyboardInterrupt
    assert events.read_events(store)[-1]["event"] == "run_interrupted"


def test_drivers_do_not_write_each_others_files(store: RunDir) -> None:
    first, second = events.EventLog(store), events.EventLog(store)
    first.session, second.session = "20260101T000000-a-1", "20260102T000000-b-1"
    second.note("b")
    first.note("a")
    assert [line["event"] for line in events.read_events(store)] == ["a", "b"]


def test_storage_that_fails_loses_no_line(store: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: events.EventLog, text: str) -> None:
        raise OSError(28, "No space left on device")

    with events.recorded(store):
        with monkeypatch.context() as patch:
            patch.setattr(events.EventLog, "_write", full)
            events.note("while it was full")
        events.note("later")
    assert [line["event"] for line in events.read_events(store)] == [
        "run_started", "while it was full", "later", "run_finished",
    ]  # fmt: skip


def test_without_a_log_nothing_is_written(store: RunDir) -> None:
    events.note("stage_kept")
    events.entered("dpo", 1)
    assert events.read_events(store) == []
