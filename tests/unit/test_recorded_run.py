"""What a run leaves beside its artifacts: events, a last heartbeat, and what its manifests say about time and size."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from dpo4rec_ray.config import Config, load_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.pipeline import STAGES
from dpo4rec_ray.running import Selection, run_pipeline
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.events import note, read_events
from dpo4rec_ray.store.heartbeat import read_heartbeat
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import Progress

ONLY = Selection(only="prepare")


def prepare(config: Config, store: RunDir, round_id: int) -> Outcome:
    for name in ("users", "items", "truth", "lists"):
        (store.start(name) / "part").write_bytes(b"x" * 100)
    with Progress("prepare", 4, "rows") as progress:
        progress.at(1)
        time.sleep(0.02)
        progress.at(4)
    note("set_aside", shard=3, users=2)
    return Outcome(rows_in=4, rows_out=2)


def failing(config: Config, store: RunDir, round_id: int) -> Outcome:
    raise UserError("no such file")


def test_a_stage_leaves_its_time_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "prepare", replace(STAGES["prepare"], run=prepare))
    store = RunDir(tmp_path / "mine")
    with Progress("of another stage", 1, "rows"):
        pass
    run_pipeline(load_config("demo"), store, ONLY)
    made = store.require("lists")
    assert made.bytes == 100
    (timing,) = made.timings
    assert (timing["label"], timing["units"], timing["first_units"]) == ("prepare", 4, 1)
    found = read_events(store)
    assert [line["event"] for line in found] == [
        "run_started", "stage_started", "set_aside", "stage_finished", "run_finished",
    ]  # fmt: skip
    assert {(line["run"], line["stage"], line["round"]) for line in found[1:]} == {("mine", "prepare", 0)}
    assert (found[3]["rows_in"], found[3]["rows_out"]) == (4, 2) and found[1]["why"] == "not there yet"
    beat = read_heartbeat(store)
    assert beat is not None and (beat.ended, beat.stage) == ("finished", "prepare")


def test_a_run_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "prepare", replace(STAGES["prepare"], run=failing))
    store = RunDir(tmp_path / "mine")
    with pytest.raises(UserError):
        run_pipeline(load_config("demo"), store, ONLY)
    last = read_events(store)[-1]
    assert (last["event"], last["stage"], last["error"]) == ("run_failed", "prepare", "no such file")
    beat = read_heartbeat(store)
    assert beat is not None and beat.ended == "failed: no such file"
