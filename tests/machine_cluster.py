"""A Ray cluster of three machines with private disks, for tests of runs and servers on many nodes.

What the machines share is a folder, or an S3 server on a fourth machine, and nothing else.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from dpo4rec_ray.serving.haproxy import ON_CLUSTERS
from dpo4rec_ray.store.artifacts import RunDir
from tests.conftest import DEMO, TINY, until
from tests.machines import RAY_ENV, Machine, machines, missing, start_ray
from tests.object_store import BUCKET, store_at, store_environment

WHY_NOT = missing()
MARKS = [pytest.mark.ray, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.timeout(1800)]
BIN = Path(sys.executable).parent  # ray's and dpo4rec's commands
SHARED = Path("/tmp/cluster")  # on the machines, and a link to it here
CUT_S = 30  # so long a cable is out, or the store away
S3_PORT, PROXY_PORT = 5001, 5000
MODE = "/tmp/mode"  # on the machine of the S3 server


@dataclass
class Cluster:
    """Three machines with Ray, and where what they share is.

    Attributes:
        storage: folder or URI that all of them see, as does this process.
        logs: folder of this machine.
        store: the machine of the S3 server, if there is one.
    """

    nodes: list[Machine]
    storage: str
    logs: Path
    store: Machine | None = None
    address: str = ""

    @property
    def head(self) -> Machine:
        return self.nodes[0]

    @property
    def web(self) -> str:
        return f"http://{self.head.address}:8265"

    @property
    def root(self) -> str:
        return f"{self.storage}/runs"

    def start(self) -> None:
        self.address = start_ray(self.nodes)
        for node in self.nodes:
            node.env |= {"RAY_ADDRESS": self.address, "RAY_API_SERVER_ADDRESS": self.web}

    def reboot(self) -> None:
        """Power off every machine, and start them and Ray again."""
        for node in self.nodes:
            node.power_off()
        for node in self.nodes:
            node.boot()
        self.start()

    def store_is(self, mode: str) -> None:
        """What the proxy before the S3 server does from now on: "503", "hang", or "" (tests/flaky_proxy.py)."""
        assert self.store is not None
        self.store.write(MODE, mode.encode())

    def store_is_for_a_while(self, mode: str) -> None:
        self.store_is(mode)
        time.sleep(CUT_S)
        self.store_is("")

    def cut_worker(self) -> None:
        """The last machine's cable is out for a while."""
        self.nodes[2].cut()
        time.sleep(CUT_S)
        self.nodes[2].heal()

    def line(self, name: str, *arguments: str) -> str:
        """The command line of a small demo run, with an engine on each of two machines."""
        keys = [f"run.root={self.root}", f"run.name={name}", "generate.num_engines=2"]
        return " ".join(["python jobs/run.py", DEMO, *TINY, *keys, *arguments])

    def submitted(self, name: str, *arguments: str) -> str:
        """The same as a Ray job, with the run's name as its id."""
        return f"ray job submit --submission-id {name} --working-dir . -- {self.line(name, *arguments)}"

    def run_dir(self, name: str) -> RunDir:
        return RunDir(f"{self.root}/{name}")


@contextlib.contextmanager
def started(storage: str, logs: Path) -> Iterator[Cluster]:
    """storage: "shared" or "s3"."""
    env = {**RAY_ENV, **ON_CLUSTERS, "PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    if storage == "shared":
        shared = logs / "shared"
        shared.mkdir()
        if SHARED.is_symlink():
            SHARED.unlink()  # of a session that was killed
        SHARED.symlink_to(shared)
        try:
            with machines(3, shared=shared, env=env) as nodes:
                found = Cluster(nodes, str(SHARED), logs)
                found.start()
                yield found
        finally:
            SHARED.unlink()
        return
    with machines(4, env=env) as nodes:
        store = nodes.pop()
        web = f"http://{store.address}:{PROXY_PORT}"
        store.popen(f"python -m moto.server -H 0.0.0.0 -p {S3_PORT}", logs / "s3.log")
        proxy = f"python tests/flaky_proxy.py 0.0.0.0 {PROXY_PORT} http://127.0.0.1:{S3_PORT} {MODE}"
        store.popen(proxy, logs / "proxy.log")
        for node in nodes:
            node.env |= store_environment(web)
        until(lambda: _made(f"{web}/{BUCKET}"), 60)
        with store_at(web):
            found = Cluster(nodes, f"s3://{BUCKET}", logs, store)
            found.start()
            yield found


def _made(bucket: str) -> bool:
    with contextlib.suppress(requests.ConnectionError):
        return requests.put(bucket, timeout=5).ok
    return False
