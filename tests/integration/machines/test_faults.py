"""What is left of a run when a machine, its cable, its disk, the store, or the driver fails: nothing lost, nothing twice.

Two runs with many faults are in the default suite. The whole matrix, fault by stage, is `make chaos`: a cell begins with the
stages before it complete, and prints a line that starts with FAULT for the table in docs/cluster.md.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpo4rec_ray.config import read_config
from dpo4rec_ray.pipeline import STAGES, steps
from dpo4rec_ray.storage.places import copy_folder, place, remove
from dpo4rec_ray.store.artifacts import RunDir
from tests.conftest import Finished, until
from tests.machine_cluster import MARKS, Cluster
from tests.same_runs import assert_same

pytestmark = MARKS
LONGEST_S = 900  # from a fault to the end of the job, whatever the end is


@dataclass
class Job:
    """A run in progress, on the head or submitted."""

    cluster: Cluster
    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, cluster: Cluster, name: str, *, submit: bool = False) -> Job:
        log = cluster.logs / f"{name}.log"
        log.unlink(missing_ok=True)
        line = cluster.submitted(name) if submit else cluster.line(name)
        return cls(cluster, name, cluster.head.popen(line, log), log)

    def reach(self, stage: str, seconds: float) -> None:
        """Wait until so many seconds into the stage."""
        started = f"{stage}: started"
        until(lambda: started in self.log.read_text() or self.process.poll() is not None, 1200)
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        time.sleep(seconds)

    def end(self) -> int:
        try:
            return self.process.wait(LONGEST_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"no end {LONGEST_S} s after the fault: {self.log.read_text()[-2000:]}")


def power_off_worker(job: Job) -> None:
    job.cluster.nodes[2].power_off()


def power_off_head(job: Job) -> None:
    job.cluster.head.power_off()


def cut_worker(job: Job) -> None:
    job.cluster.cut_worker()


def fill_worker(job: Job) -> None:
    job.cluster.nodes[2].fill_disk()


def slow_worker(job: Job) -> None:
    job.cluster.nodes[2].slow()


def store_says_503(job: Job) -> None:
    job.cluster.store_is_for_a_while("503")


def store_hangs(job: Job) -> None:
    job.cluster.store_is_for_a_while("hang")


def kill_driver(job: Job) -> None:
    job.cluster.head.run("pkill -KILL -f '[j]obs/run.py'")


def stop_job(job: Job) -> None:
    """Of a submitted job. Ray's client, which shows its output, then ends with 0."""
    done = job.cluster.head.run(f"ray job stop {job.name}")
    assert done.returncode == 0, done.stdout + done.stderr


Act = Callable[[Job], None]
OF_MACHINES: dict[str, Act] = {
    act.__name__: act
    for act in (
        power_off_worker,
        power_off_head,
        cut_worker,
        fill_worker,
        slow_worker,
        kill_driver,
        stop_job,
    )
}
OF_STORE: dict[str, Act] = {act.__name__: act for act in (store_says_503, store_hangs)}
FAULTS = OF_MACHINES | OF_STORE
# Seconds into the stage at which the fault comes: it should be at work.
AT = {
    "prepare(0)": 1.0,
    "encode(0)": 12.0,
    "train_reward(0)": 3.0,
    "generate(1)": 4.0,
    "score(1)": 5.0,
    "dpo(1)": 12.0,
    "validate(1)": 2.0,
    "evaluate(1)": 5.0,
}


SHARED = pytest.mark.parametrize("cluster", ["shared"], indirect=True)
ON_S3 = pytest.mark.parametrize("cluster", ["s3"], indirect=True)
WHERE = [("shared", fault) for fault in OF_MACHINES] + [("s3", fault) for fault in OF_STORE]


@SHARED
def test_many_faults_in_one_run(cluster: Cluster, tiny_run: Finished) -> None:
    """A slow node, a dead driver, a stopped job and a lost node, and the run is what it would have been.

    The run begins with its first stages complete.
    """
    before(cluster, tiny_run, "many", "generate(1)")
    job = Job.start(cluster, "many")
    job.reach("generate(1)", AT["generate(1)"])
    slow_worker(job)
    time.sleep(15)
    cluster.nodes[2].normal_speed()
    job.reach("score(1)", AT["score(1)"])
    kill_driver(job)
    assert job.end() == -9
    job = Job.start(cluster, "many", submit=True)
    job.reach("dpo(1)", AT["dpo(1)"])
    stop_job(job)
    job.end()
    job = Job.start(cluster, "many")
    job.reach("encode(1)", 2.0)
    power_off_worker(job)
    assert job.end() == 0, job.log.read_text()[-3000:]
    assert_same(cluster.run_dir("many"), tiny_run)


@ON_S3
def test_a_store_that_is_away_for_a_while(cluster: Cluster, tiny_run: Finished) -> None:
    """Requests are asked again: no job ends, and none loses a row. The run begins with its first stages complete."""
    before(cluster, tiny_run, "away", "score(1)")
    job = Job.start(cluster, "away")
    for stage, fault in (("score(1)", store_says_503), ("dpo(1)", store_hangs)):
        job.reach(stage, AT[stage])
        fault(job)
    assert job.end() == 0, job.log.read_text()[-3000:]
    assert_same(cluster.run_dir("away"), tiny_run, within=1e-4)
    asked = (cluster.logs / "proxy.log").read_text()
    assert "503 " in asked and "hang " in asked, "nothing was asked of the store while it was away"


@pytest.mark.chaos
@pytest.mark.parametrize("stage", AT)
@pytest.mark.parametrize(("cluster", "fault"), WHERE, indirect=["cluster"])
def test_a_fault_costs_no_row(cluster: Cluster, tiny_run: Finished, fault: str, stage: str) -> None:
    """It ends in a finished, equal run, or in one clear line and a run that the same command finishes."""
    name = f"{fault}-{stage.partition('(')[0]}"
    before(cluster, tiny_run, name, stage)
    job = Job.start(cluster, name, submit=fault == "stop_job")
    job.reach(stage, AT[stage])
    FAULTS[fault](job)
    struck = time.monotonic()
    code = job.end()
    ended = time.monotonic() - struck
    outcome = "went on"
    if code or fault == "stop_job":
        text = job.log.read_text()
        assert "Traceback" not in text, text[-3000:]
        if fault not in ("kill_driver", "stop_job"):
            cluster.reboot()
        began = time.monotonic()
        done = cluster.head.run(cluster.line(name), timeout=1500)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        outcome = f"ended with {code}; the same command: {time.monotonic() - began:.0f} s"
    assert_same(cluster.run_dir(name), tiny_run)
    print(f"FAULT {fault} | {stage} | {outcome} | ended {ended:.0f} s after the fault | lost 0 | doubled 0")
    remove(place(f"{cluster.root}/{name}"))
    if outcome == "went on" and fault in ("power_off_worker", "fill_worker", "slow_worker", "cut_worker"):
        cluster.reboot()


def before(cluster: Cluster, reference: Finished, name: str, stage: str) -> None:
    """Give the cluster a run whose stages before this one are those of the reference."""
    config, store = read_config(reference.folder), RunDir(reference.folder)
    for done, round_id in steps(config):
        if f"{done}({round_id})" == stage:
            return
        for artifact in STAGES[done].writes(round_id):
            copy_folder(store.path(*artifact), cluster.run_dir(name).path(*artifact))
