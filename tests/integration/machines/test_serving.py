"""A server on three machines with private disks, while one of them fails. The registry is a shared folder, or a bucket."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests

from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.storage.places import copy_folder, place
from dpo4rec_ray.store.artifacts import RunDir
from tests.conftest import until
from tests.machine_cluster import MARKS, Cluster
from tests.machines import Machine
from tests.serving_world import requests_of

pytestmark = [*MARKS, pytest.mark.chaos]
THREADS, NUM_REPLICAS = 8, 3


class Asking:
    """Two programs on the second machine ask for reranks: one as it is, one that asks again as our client does."""

    def __init__(self, cluster: Cluster, bodies: list[dict[str, Any]]):
        self._node, self._stop = cluster.nodes[1], f"/tmp/stop-{time.time()}"
        file = cluster.logs / "bodies.json"
        file.write_text(json.dumps(bodies))
        self._node.write("/tmp/bodies.json", file.read_bytes())
        command = (
            f"python tests/asking.py http://{self._node.address}:8000 {THREADS} {self._stop} /tmp/bodies.json"
        )
        self._programs = {
            name: subprocess.Popen(
                self._node.command(f"PYTHONPATH=. {command} {flag}"), stdout=subprocess.PIPE, text=True
            )
            for name, flag in (("once", "--once"), ("client", ""))
        }

    def end(self) -> dict[str, dict[str, Any]]:
        self._node.run(f"touch {self._stop}")
        return {
            name: json.loads(program.communicate(timeout=120)[0]) for name, program in self._programs.items()
        }


@pytest.fixture(scope="module")
def bodies(served_run: RunDir) -> list[dict[str, Any]]:
    return [{key: one[key] for key in ("user_id", "candidates")} for one in requests_of(served_run)]


@pytest.fixture(scope="module")
def configured(cluster: Cluster, published: Registry) -> Cluster:
    """The published versions where all machines see them, and the server's config."""
    copy_folder(published.root, place(f"{cluster.storage}/registry"))
    keys = f"serving.registry={cluster.storage}/registry serving.host=0.0.0.0 serving.num_replicas={NUM_REPLICAS}"
    made = cluster.head.run(f"dpo4rec serve config {keys}")
    assert made.returncode == 0, made.stderr
    (cluster.logs / "serve.yaml").write_text(made.stdout)
    return cluster


def deploy(cluster: Cluster) -> None:
    cluster.head.write("/tmp/serve.yaml", (cluster.logs / "serve.yaml").read_bytes())
    done = cluster.head.run(f"serve deploy -a {cluster.web} /tmp/serve.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    until(lambda: all(answers(node.address) for node in cluster.nodes), 300)


def answers(address: str) -> bool:
    try:
        return requests.get(f"http://{address}:8000/readyz", timeout=2).ok
    except requests.RequestException:
        return False


def replicas(node: Machine) -> int:
    found = 0
    for pid in node.pids():
        with suppress(OSError):
            found += "ServeReplica" in Path(f"/proc/{pid}/cmdline").read_text()
    return found


@contextmanager
def asked(cluster: Cluster, bodies: list[dict[str, Any]], fault: str) -> Iterator[dict[str, Any]]:
    """Reranks are asked for while the block runs, and five seconds before and after; found: what came of it."""
    found: dict[str, Any] = {}
    asking = Asking(cluster, bodies)
    time.sleep(5)
    yield found
    time.sleep(5)
    found |= asking.end()
    short = {name: {**row, "failed": len(row["failed"])} for name, row in found.items()}
    print(f"FAULT {fault} | serving | {json.dumps(short)}")


def power_off_worker(cluster: Cluster) -> None:
    cluster.nodes[2].power_off()
    until(lambda: sum(map(replicas, cluster.nodes[:2])) == NUM_REPLICAS, 120)


def cut_worker(cluster: Cluster) -> None:
    cluster.cut_worker()
    time.sleep(10)


def fill_worker(cluster: Cluster) -> None:
    cluster.nodes[2].fill_disk()
    time.sleep(10)


def slow_worker(cluster: Cluster) -> None:
    cluster.nodes[2].slow()
    time.sleep(20)


FAULTS: dict[str, Callable[[Cluster], None]] = {
    act.__name__: act for act in (power_off_worker, cut_worker, fill_worker, slow_worker)
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_node_with_a_replica_fails(configured: Cluster, bodies: list[dict[str, Any]], fault: str) -> None:
    """At most what was in flight on it fails, and nothing for those who ask a second time."""
    deploy(configured)
    assert all(map(replicas, configured.nodes)), "a machine has no replica"
    with asked(configured, bodies, fault) as found:
        FAULTS[fault](configured)
    assert found["client"]["failed"] == [], found
    assert len(found["once"]["failed"]) <= THREADS, found
    assert min(found["once"]["answered"], found["client"]["answered"]) > 100, found
    configured.reboot()


def test_the_store_is_away(configured: Cluster, bodies: list[dict[str, Any]]) -> None:
    """Versions that answer need it no more; a version that is promoted meanwhile answers when it is back."""
    if not configured.storage.startswith("s3"):
        pytest.skip("the fault is the S3 server's")
    deploy(configured)
    with asked(configured, bodies, "store_says_503") as found:
        configured.store_is_for_a_while("503")
    assert found["client"]["failed"] == found["once"]["failed"] == [], found
    done = configured.head.run(f"dpo4rec serve promote v2 --registry {configured.storage}/registry")
    assert done.returncode == 0, done.stdout + done.stderr
    until(lambda: model_of(configured.nodes[1], bodies[0]) == "v2", 60)
    configured.head.run(f"dpo4rec serve rollback --registry {configured.storage}/registry")


def test_the_head_is_powered_off(configured: Cluster, bodies: list[dict[str, Any]]) -> None:
    """Without a store for Ray's own state (redis.yaml) the server ends with it; the same command brings it back."""
    deploy(configured)
    configured.reboot()
    assert not answers(configured.nodes[1].address)
    began = time.monotonic()
    deploy(configured)
    assert model_of(configured.nodes[1], bodies[0]) == "v1"
    print(
        f"FAULT power_off_head | serving | answers {time.monotonic() - began:.0f} s after `serve deploy` again"
    )


def model_of(node: Machine, body: dict[str, Any]) -> str:
    """The version that answers."""
    answer = requests.post(f"http://{node.address}:8000/v1/rerank", json=body, timeout=20)
    answer.raise_for_status()
    return answer.json()["model"]
