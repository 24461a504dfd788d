"""Engines, actors and drivers killed or hung while users are sampled: in the end every user has exactly N samples."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from dpo4rec_ray.store.artifacts import RunDir
from tests.conftest import DEMO, ROOT, command, end_by_themselves, run_job

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos]

NUM_SAMPLES = 10
STEP = ["--only", "generate", "--round", "1"]
RECIPE = [
    DEMO,
    "generate.users_per_shard=4",
    "generate.num_engines=1",
    "generate.keep_engines=false",
    "generate.max_num_seqs=64",  # a slow engine, so that there is time to kill it
    f"generate.num_samples={NUM_SAMPLES}",
    "generate.stall_timeout_s=10",
]


class Job:
    """A driver under attack. own_process: whether the engine runs in a process of its own beside the actor's."""

    def __init__(self, folder: Path, recipe: list[str], own_process: bool):
        self.log = open(folder / "log.txt", "a")  # noqa: SIM115
        self.process = subprocess.Popen(
            command(*recipe, *STEP, f"run.root={folder}", "run.name=run"),
            cwd=ROOT,
            env={
                **os.environ,
                "RAY_ADDRESS": "",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if own_process else "0",
            },
            stdout=self.log,
            stderr=self.log,
        )

    def descendants(self, part: str) -> list[psutil.Process]:
        """Processes below the driver whose command line holds `part`."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if part in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.end(signal.SIGKILL)
        self.log.close()

    def end(self, sent: signal.Signals) -> None:
        """Send the driver a signal; nothing of it may be left."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(sent)
        self.process.wait(timeout=120)
        end_by_themselves(children)


def wait_for_progress(job: Job, generations: Path, more: int) -> bool:
    """Until `more` new parts are there; False when the job came to its end before."""
    goal = len(list(generations.glob("part-*.parquet"))) + more
    deadline = time.monotonic() + 240
    while len(list(generations.glob("part-*.parquet"))) < goal:
        if job.process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "no progress for four minutes"
        time.sleep(0.05)
    return True


def test_five_hundred_users_through_ten_kills(tmp_path: Path) -> None:
    recipe = [*RECIPE, "sample.num_users=560"]
    assert run_job(tmp_path, *recipe, "--only", "prepare").code == 0
    store = RunDir(tmp_path / "run")
    generations = store.path("generations", 1)
    kinds = ["actor", "engine", "driver", "hang", "actor", "interrupt", "engine", "hang", "driver", "actor"]
    rng = random.Random(0)
    done: list[str] = []
    with contextlib.ExitStack() as jobs:
        job = jobs.enter_context(Job(tmp_path, recipe, own_process=True))
        for kind in kinds:
            if not wait_for_progress(job, generations, 3):
                break
            time.sleep(rng.random())
            if kind in ("driver", "interrupt"):
                job.end(signal.SIGKILL if kind == "driver" else signal.SIGINT)
                assert not (generations / "manifest.json").exists()
                job = jobs.enter_context(Job(tmp_path, recipe, own_process=len(done) % 4 < 2))
            else:
                actors = job.descendants("MapWorker(FlatMap(ShardGenerator))")
                engines = job.descendants("EngineCore") or actors  # in-process: actor and engine are one
                (victim,) = engines if kind == "engine" else actors
                victim.send_signal(signal.SIGSTOP if kind == "hang" else signal.SIGKILL)
            done.append(kind)
        assert len(done) == len(kinds), f"the work was done after {done}: too few kills"
        assert job.process.wait(timeout=400) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    assert len(store.read("users", split=("train", "valid"), columns=["user_id"])) >= 500
    check_all_there(tmp_path)


def check_all_there(folder: Path) -> None:
    store = RunDir(folder / "run")
    users = store.read("users", split=("train", "valid"), columns=["user_id"])["user_id"].to_pylist()
    table = store.read("generations", 1, columns=["user_id", "sample_id"])
    counts = Counter(zip(table["user_id"].to_pylist(), table["sample_id"].to_pylist(), strict=True))
    assert counts == {(user, sample): 1 for user in users for sample in range(NUM_SAMPLES)}
    assert not len(store.failed("generations", 1))


def test_a_lost_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes with an engine each; one is killed, another joins."""
    from ray.cluster_utils import Cluster

    recipe = [*RECIPE, "sample.num_users=200", "generate.num_engines=2", "generate.cpus_per_engine=1"]
    assert run_job(tmp_path, *recipe, "--only", "prepare").code == 0
    generations = RunDir(tmp_path / "run").path("generations", 1)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 2**27}, connect=False
    )
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=2**27) for _ in range(2)]
        log = tmp_path / "log.txt"
        with open(log, "w") as output:
            job = subprocess.Popen(
                command(*recipe, *STEP, f"run.root={tmp_path}", "run.name=run"),
                cwd=ROOT,
                env={**os.environ, "RAY_ADDRESS": cluster.address},
                stdout=output,
                stderr=output,
            )
            deadline = time.monotonic() + 300
            while len(list(generations.glob("part-*.parquet"))) < 6:
                assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.05)
            cluster.remove_node(nodes[1], allow_graceful=False)
            time.sleep(5)
            cluster.add_node(num_cpus=1, object_store_memory=2**27)
            assert job.wait(timeout=400) == 0, log.read_text()[-3000:]
    finally:
        cluster.shutdown()
    check_all_there(tmp_path)


def test_a_full_disk(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        recipe = [*RECIPE, "sample.num_users=200"]
        assert run_job(folder, *recipe, "--only", "prepare").code == 0
        free = os.statvfs(folder)
        (folder / "filler").write_bytes(b"\0" * (free.f_bavail * free.f_frsize - 150 * 1024))
        full = run_job(folder, *recipe, *STEP)
        assert full.code == 2, full.stderr
        assert "no space left on the disk" in full.stderr and full.stderr.count("\n") == 1
        done = len(list(RunDir(folder / "run").path("generations", 1).glob("part-*.parquet")))
        assert 0 < done < 45
        (folder / "filler").unlink()
        again = run_job(folder, *recipe, *STEP)
        assert again.code == 0 and "users kept from an interrupted run" in again.stdout
        check_all_there(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)
