"""What is said of a run from its folder alone: manifests and a heartbeat as a driver leaves them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dpo4rec_ray.cli import status as command
from dpo4rec_ray.config import Config, load_config
from dpo4rec_ray.run_status import lines, status
from dpo4rec_ray.store.artifacts import RunDir, write_json
from dpo4rec_ray.store.events import recorded
from dpo4rec_ray.store.heartbeat import HEARTBEAT, Heartbeat
from tests.unit.test_dry_run import finish

NOW = 1_000.0
GENERATE = {
    "label": "generate", "unit": "users", "done": 120, "total": 540, "rate": 20.0, "left_s": 21.0, "open_s": 9.0, "starting": "",
}  # fmt: skip


@pytest.fixture
def config() -> Config:
    return load_config("demo", ["run.num_rounds=2"])


@pytest.fixture
def store(tmp_path: Path, config: Config) -> RunDir:
    """A finished run."""
    found = RunDir(tmp_path / "mine")
    finish(config, found)
    write_json(found.root / "config.json", config.model_dump(mode="json"))
    return found


def beat(store: RunDir, stage: str, round_id: int, **more: Any) -> None:
    own = Heartbeat(NOW - 2, "gpu-1", 77, "s", stage, round_id, NOW - 42, **more)
    write_json(store.root / HEARTBEAT, asdict(own))


def remove(store: RunDir, *artifacts: tuple[str, int]) -> None:
    for name, number in artifacts:
        store.start(name, number)


def states(config: Config, store: RunDir) -> dict[str, str]:
    return {f"{step.stage}({step.round})": step.state for step in status(config, store, NOW).steps}


def test_a_running_stage_with_what_is_before_and_after_it(config: Config, store: RunDir) -> None:
    remove(store, ("generations", 1), ("scores", 1), ("metric_scores", 1), ("per_list", 0))
    beat(store, "generate", 1, progress=[GENERATE])
    found = status(config, store, NOW)
    assert (found.run, found.state, found.sign_age_s, found.node, found.pid) == (
        "mine",
        "running",
        2,
        "gpu-1",
        77,
    )
    assert states(config, store) == {
        "prepare(0)": "finished", "encode(0)": "finished", "references(0)": "finished", "train_reward(0)": "finished",
        "generate(1)": "running", "score(1)": "left", "pair(1)": "made earlier", "dpo(1)": "made earlier",
        "encode(1)": "made earlier", "validate(1)": "made earlier", "generate(2)": "made earlier", "score(2)": "made earlier",
        "pair(2)": "made earlier", "dpo(2)": "made earlier", "encode(2)": "made earlier", "validate(2)": "made earlier",
        "evaluate(2)": "left",
    }  # fmt: skip
    said = list(lines(found))
    assert said[0] == "mine: running; last sign of life 2.0 s ago (node gpu-1, process 77)"
    assert said[5].split(None, 2)[2] == "40.0 s so far, generate 120/540 users, 20.0/s, 21.0 s left"
    assert said[1].split(None, 2)[2] == "1 rows in, 1 out, 0.0 s"


def test_workers_that_start_are_said(config: Config, store: RunDir) -> None:
    remove(store, ("generations", 1))
    one = GENERATE | {"done": 0, "rate": None, "left_s": None, "starting": "1 importing vLLM"}
    beat(store, "generate", 1, progress=[one])
    said = list(lines(status(config, store, NOW)))[5]
    assert said.endswith("40.0 s so far, generate 0/540 users: 1 importing vLLM")


@pytest.mark.parametrize(
    ("age", "ended", "state"),
    [
        (29, "", "running"),
        (31, "", "lost"),
        (31, "finished", "finished"),
        (5, "failed: no room", "failed: no room"),
    ],
)
def test_how_a_run_is(config: Config, store: RunDir, age: float, ended: str, state: str) -> None:
    write_json(store.root / HEARTBEAT, asdict(Heartbeat(NOW - age, "a", 1, "s", "dpo", 2, 0.0, ended=ended)))
    found = status(config, store, NOW)
    assert (found.state, found.sign_age_s) == (state, age)
    running = {step.stage for step in found.steps if step.state == "running"}
    assert running == (set() if ended else {"dpo"})


def test_a_driver_whose_clock_is_ahead(config: Config, store: RunDir) -> None:
    beat(store, "dpo", 2)
    assert status(config, store, NOW - 10).sign_age_s == 0


def test_a_finished_run_whose_rounds_ended_early(config: Config, store: RunDir) -> None:
    names = ("generations", "scores", "metric_scores", "pairs", "policy", "knowledge", "heldout")
    remove(store, *((name, 2) for name in names))
    found = states(config, store)
    assert {found[f"{name}(2)"] for name in ("generate", "score", "pair", "dpo", "encode", "validate")} == {
        "not needed"
    }
    assert found["evaluate(2)"] == "finished"
    assert status(config, store, NOW).state == "not running"


def test_a_run_that_has_only_begun(config: Config, tmp_path: Path) -> None:
    assert set(states(config, RunDir(tmp_path)).values()) == {"left"}


def test_the_command(store: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(store.root)]) == 0
    assert capsys.readouterr().out.startswith("mine: not running; no job has left word\n  prepare(0)")
    assert command.main([str(store.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"][0]["stage"] == "prepare"
    assert command.main([str(store.root), "--events"]) == 2
    assert "holds no events" in capsys.readouterr().err
    with recorded(store):
        pass
    assert command.main([str(store.root), "--events"]) == 0
    events = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert events == ["run_started", "run_finished"]


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
