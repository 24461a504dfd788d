"""A driver killed with SIGKILL: the same command finishes the run, and no user is lost or doubled."""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from dpo4rec_ray.store.artifacts import RunDir
from tests.conftest import DEMO, ROOT, TINY, command, kill_driver, run_job

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos]

RECIPE = [
    DEMO,
    *TINY,
    "generate.num_samples=10",
    "generate.users_per_shard=3",
    "generate.num_engines=1",
    "generate.keep_engines=false",
]


def kill_when(folder: Path, arguments: list[str], ready: Path, pattern: str) -> None:
    """Start the job, wait for a file that shows the stage is at work, kill the driver, then what it leaves behind."""
    process = subprocess.Popen(
        command(*arguments, f"run.root={folder}", "run.name=run"),
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 400
    while not list(ready.glob(pattern)):
        assert process.poll() is None, (
            f"the job ended with code {process.returncode} before it could be killed"
        )
        assert time.monotonic() < deadline, f"no {pattern} in {ready}"
        time.sleep(0.02)
    kill_driver(process)


def test_generate_killed(tmp_path: Path) -> None:
    generations = tmp_path / "run/rounds/01/generations"
    kill_when(tmp_path, RECIPE, generations, "part-*.parquet")
    done_before = {file.name: file.stat().st_mtime_ns for file in generations.glob("part-*.parquet")}
    assert 0 < len(done_before) < 20, "the kill must come in the middle"
    assert not (generations / "manifest.json").exists()

    again = run_job(tmp_path, *RECIPE)
    assert again.code == 0, again.stderr
    assert "users kept from an interrupted run" in again.stdout
    skipped = {stage["stage"]: stage["skipped"] for stage in again.summary["stages"][:5]}
    assert skipped == {
        **dict.fromkeys(("prepare", "encode", "references", "train_reward"), True),
        "generate": False,
    }
    for name, stamp in done_before.items():
        assert (generations / name).stat().st_mtime_ns == stamp, f"{name} was written again"
    store = RunDir(again.folder)
    counts = Counter((row["user_id"], row["sample_id"]) for row in store.read("generations", 1).to_pylist())
    users = [row["user_id"] for row in store.read("users", split=("train", "valid")).to_pylist()]
    failed = set(store.failed("generations", 1)["subject_id"].to_pylist())
    assert counts == {(user, sample): 1 for user in users if user not in failed for sample in range(10)}


def test_dpo_killed(tmp_path: Path) -> None:
    arguments = [*RECIPE, "policy.epochs=6"]
    policy = tmp_path / "run/rounds/01/policy"
    kill_when(tmp_path, arguments, policy, "metrics.jsonl")
    assert not (policy / "manifest.json").exists()
    again = run_job(tmp_path, *arguments)
    assert again.code == 0, again.stderr
    skipped = {stage["stage"]: stage["skipped"] for stage in again.summary["stages"] if stage["round"] == 1}
    assert skipped["generate"] and skipped["score"] and skipped["pair"] and not skipped["dpo"]
    assert again.summary["rounds"][0]["training"]["first_loss"] == pytest.approx(0.6931, abs=1e-3)
