"""Runs on three machines with private disks: the same rows and figures as on one, and what is left after faults.

What the machines share is a folder, or an S3 server on a fourth machine, and nothing else.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from dpo4rec_ray.storage.places import place, remove
from dpo4rec_ray.store.artifacts import RunDir
from tests.conftest import DEMO, ROOT, TINY, Finished
from tests.machines import RAY_ENV, Machine, machines, missing, start_ray
from tests.object_store import BUCKET, store_environment

WHY_NOT = missing()
pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

BIN = ROOT / ".venv/bin" if (ROOT / ".venv/bin").is_dir() else Path(shutil.which("ray") or "/").parent
S3_PORT, PROXY_PORT = 5001, 5000


@dataclass
class Cluster:
    """Three machines with Ray, and where their runs are."""

    nodes: list[Machine]
    root: str
    log: Path
    mode: Path  # of the proxy before the S3 server
    address: str = ""

    @property
    def head(self) -> Machine:
        return self.nodes[0]

    def start(self) -> None:
        self.address = start_ray(self.nodes)
        for node in self.nodes:
            node.env["RAY_ADDRESS"] = self.address

    def reboot(self) -> None:
        """Power off every machine, and start them and Ray again."""
        for node in self.nodes:
            node.power_off()
        for node in self.nodes:
            node.boot()
        self.start()

    def line(self, name: str, *arguments: str) -> str:
        return " ".join(
            ["python jobs/run.py", DEMO, *TINY, f"run.root={self.root}", f"run.name={name}", *arguments]
        )

    def submitted(self, name: str, *arguments: str) -> str:
        web = f"http://{self.head.address}:8265"
        return f"ray job submit --address {web} --working-dir . -- {self.line(name, *arguments)}"

    def run_dir(self, name: str) -> RunDir:
        return RunDir(f"{self.root}/{name}")


@pytest.fixture(scope="module", params=["shared", "s3"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("machines")
    mode = folder / "mode"
    env = dict(RAY_ENV) | {"PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    shared = folder / "shared"
    shared.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "shared":
            with machines(3, shared=shared, env=env) as nodes:
                # The host sees the folder at another place than the nodes.
                (Path("/tmp/cluster")).symlink_to(shared) if not Path("/tmp/cluster").exists() else None
                found = Cluster(nodes, "/tmp/cluster/runs", folder / "log", mode)
                found.start()
                yield found
            Path("/tmp/cluster").unlink(missing_ok=True)
            return
        with machines(4, env=env) as nodes:
            store = nodes.pop()
            web = f"http://{store.address}:{PROXY_PORT}"
            store.popen(f"python -m moto.server -H 0.0.0.0 -p {S3_PORT}", folder / "s3.log")
            proxy = f"python tests/flaky_proxy.py 0.0.0.0 {PROXY_PORT} http://127.0.0.1:{S3_PORT} {mode}"
            store.popen(proxy, folder / "proxy.log")
            for node in nodes:
                node.env |= store_environment(web)
            for name, value in store_environment(web).items():
                patch.setenv(name, value)
            for _ in range(300):
                try:
                    requests.put(f"{web}/{BUCKET}", timeout=5).raise_for_status()
                    break
                except (requests.ConnectionError, requests.HTTPError):
                    time.sleep(0.2)
            found = Cluster(nodes, f"s3://{BUCKET}/runs", folder / "log", mode)
            found.start()
            yield found


def assert_same(store: RunDir, reference: Finished, within: float = 2e-3) -> None:
    """Rows are neither lost nor doubled, and evaluation says the same: DPO that was continued may differ in the last digits."""
    other = RunDir(reference.folder)
    for name, round_id in (("users", 0), ("items", 0), ("lists", 0), ("generations", 1), ("scores", 1)):
        assert store.read(name, round_id).num_rows == other.read(name, round_id).num_rows, name
    for name in ("users", "items", "lists"):
        assert store.read(name).equals(other.read(name)), name
    ids = store.read("generations", 1, columns=["user_id", "sample_id"]).to_pandas()
    assert not ids.duplicated().any()
    one, same = (json.loads((run.root / "summary.json").read_text())["systems"] for run in (store, other))
    for row, expected in zip(one, same, strict=True):
        assert row == pytest.approx(expected, abs=within, nan_ok=True), row["system"]


def test_the_same_rows_and_figures_as_on_one_machine(cluster: Cluster, tiny_run: Finished) -> None:
    done = cluster.head.run(cluster.submitted("plain"), timeout=1500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert_same(cluster.run_dir("plain"), tiny_run, within=1e-4)


def test_a_second_job_on_the_same_run_is_refused(cluster: Cluster) -> None:
    first = cluster.nodes[1].popen(cluster.line("twice"), cluster.log)
    until(lambda: any((cluster.run_dir("twice").root / ".lease").glob("*.json")), 120)
    second = cluster.nodes[2].run(cluster.line("twice"), timeout=300)
    assert first.poll() is None, "the first job had ended"
    assert second.returncode == 2, second.stdout + second.stderr
    [line] = [one for one in second.stderr.splitlines() if one.startswith("error:")]
    assert "another job (process " in line and "Traceback" not in second.stderr
    cluster.nodes[1].run("pkill -TERM -f '[j]obs/run.py'")
    assert first.wait(120) == 143
    assert not any((cluster.run_dir("twice").root / ".lease").glob("*.json"))


Act = Callable[[Cluster, subprocess.Popen[bytes]], None]


def power_off_worker(cluster: Cluster, driver: subprocess.Popen[bytes]) -> None:
    cluster.nodes[2].power_off()


def power_off_head(cluster: Cluster, driver: subprocess.Popen[bytes]) -> None:
    cluster.head.power_off()


def cut_worker(cluster: Cluster, driver: subprocess.Popen[bytes]) -> None:
    cluster.nodes[2].cut()
    time.sleep(30)
    cluster.nodes[2].heal()


def fill_worker(cluster: Cluster, driver: subprocess.Popen[bytes]) -> None:
    cluster.nodes[2].fill_disk()


def slow_worker(cluster: Cluster, driver: subprocess.Popen[bytes]) -> None:
    cluster.nodes[2].slow()


def store_says_503(cluster: Cluster, driver: subprocess.Popen[bytes]) -> None:
    cluster.mode.write_text("503")
    time.sleep(30)
    cluster.mode.write_text("")


def store_hangs(cluster: Cluster, driver: subprocess.Popen[bytes]) -> None:
    cluster.mode.write_text("hang")
    time.sleep(30)
    cluster.mode.write_text("")


def kill_driver(cluster: Cluster, driver: subprocess.Popen[bytes]) -> None:
    cluster.head.run("pkill -KILL -f '[j]obs/run.py'")


def stop_job(cluster: Cluster, driver: subprocess.Popen[bytes]) -> None:
    cluster.head.run("pkill -TERM -f '[j]obs/run.py'")


FAULTS: dict[str, Act] = {
    act.__name__: act
    for act in (
        power_off_worker,
        power_off_head,
        cut_worker,
        fill_worker,
        slow_worker,
        store_says_503,
        store_hangs,
        kill_driver,
        stop_job,
    )
}
STAGES = {
    "prepare": "prepare(0): started",
    "encode": "encode(0): started",
    "train_reward": "train_reward(0): started",
    "generate": "generate(1): started",
    "score": "score(1): started",
    "dpo": "dpo(1): started",
    "validate": "validate(1): started",
    "evaluate": "evaluate(1): started",
}
AFTER_S = 8.0  # into the stage


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_no_row(cluster: Cluster, tiny_run: Finished, fault: str, stage: str) -> None:
    """Each ends in a finished, equal run, or in one clear line and a run that the same command finishes."""
    if fault.startswith("store") and not cluster.root.startswith("s3"):
        pytest.skip("the fault is the S3 server's")
    name, log = f"{fault}-{stage}", cluster.log.with_name(f"{fault}-{stage}.log")
    driver = cluster.head.popen(cluster.line(name), log)
    until(lambda: STAGES[stage] in log.read_text() or driver.poll() is not None, 1200)
    assert driver.poll() is None, log.read_text()[-3000:]
    time.sleep(AFTER_S)
    FAULTS[fault](cluster, driver)
    struck = time.monotonic()
    try:
        code = driver.wait(900)
    except subprocess.TimeoutExpired:
        driver.kill()
        pytest.fail(f"no end 900 s after the fault: {log.read_text()[-2000:]}")
    ended = time.monotonic() - struck
    text = log.read_text()
    again = 0.0
    if code:
        assert "Traceback" not in text, text[-3000:]
        for node in cluster.nodes:
            node.normal_speed()
        cluster.reboot()
        began = time.monotonic()
        done = cluster.head.run(cluster.line(name), timeout=1500)
        again = time.monotonic() - began
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert_same(cluster.run_dir(name), tiny_run)
    outcome = "went on" if not code else f"exit {code}, same command again {again:.0f} s"
    print(f"FAULT {fault} | {stage} | {outcome} | ended {ended:.0f} s after the fault | lost 0 | doubled 0")
    remove(place(f"{cluster.root}/{name}"))
    if not code and fault in ("power_off_worker", "fill_worker", "slow_worker", "cut_worker"):
        cluster.reboot()


def until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s"
        time.sleep(0.3)
