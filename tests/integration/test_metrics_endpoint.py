"""What Ray's endpoints for Prometheus have of a run and of a server, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.workers.run_metrics import METRICS, Metrics, stage_metrics, trained
from tests.conftest import ROOT

pytestmark = [pytest.mark.ray]
DASHBOARD = ROOT / "deploy" / "grafana" / "dpo4rec.json"
LINE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
TAG = re.compile(r'(\w+)="([^"]*)"')
REPORT_S = 90.0  # Ray's workers report every ten seconds, on a busy machine later

Sample = tuple[str, dict[str, str], float]


def scrape(port: int) -> list[Sample]:
    """(name, tags, value) of all that one node exposes; nothing while its endpoint is not up."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return []
    return [(name, dict(TAG.findall(tags)), float(value)) for name, tags, value in LINE.findall(text)]


def wait_for(ports: list[int], enough: Callable[[list[Sample]], bool]) -> list[Sample]:
    """What all nodes expose together, as soon as it is enough."""
    deadline, found = time.monotonic() + REPORT_S, list[Sample]()
    while time.monotonic() < deadline and not enough(found):
        time.sleep(1)
        found = [sample for port in ports for sample in scrape(port)]
    return found


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def exported(name: str) -> str:
    """What Ray makes of a name of `METRICS`."""
    return f"ray_{name}_total" if METRICS[name].kind == "counter" else f"ray_{name}"


def asked_for() -> set[str]:
    """The metrics in all expressions of the dashboard, found by Prometheus' grammar."""
    import promql_parser

    found: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            assert node.name, node
            found.add(node.name)
        for part in ("expr", "lhs", "rhs", "vector_selector", "param"):
            if (child := getattr(node, part, None)) is not None:
                walk(child)
        for child in getattr(node, "args", None) or []:
            walk(child)

    for expression in expressions():
        walk(promql_parser.parse(expression))
    return found


def expressions() -> list[str]:
    """Of all panels, with the dashboard's variables filled in."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [one.replace("$__rate_interval", "1m").replace("$run", "demo") for one in found]


def test_a_run_is_exported_as_the_dashboard_asks() -> None:
    import ray

    def work_for_a_while() -> None:  # inside: workers cannot import the tests
        engine = Metrics("demo", "generate", 1, engine="engine-7")
        for name, amount in (("users", 3), ("samples", 30), ("tokens", 900), ("failed", 1)):
            engine.count(f"dpo4rec_{name}", amount)
        for name, level in (("busy", 0.75), ("running", 12.5), ("kv_cache", 0.25)):
            engine.level(f"dpo4rec_engine_{name}", level)
        Metrics("demo", "score", 1).count("dpo4rec_rewards", 30)
        time.sleep(REPORT_S)

    port = free_port()
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=2**27,
        _metrics_export_port=port,
    )
    try:
        running = ray.remote(work_for_a_while).remote()
        with stage_metrics("demo", "dpo", 1):  # of the driver
            Progress("dpo", 20, "steps").at(5)
            trained({"loss": 0.5, "accuracy": 0.75, "rows_per_s": 8.0, "tokens_per_s": 900.0})
            names = {exported(name) for name in METRICS}
            found = wait_for([port], lambda seen: names <= {name for name, _, _ in seen})
        values = {name: value for name, tags, value in found if tags.get("run") == "demo"}
        assert values.keys() == names
        assert values["ray_dpo4rec_tokens_total"] == 900 and values["ray_dpo4rec_engine_running"] == 12.5
        assert (values["ray_dpo4rec_stage_done"], values["ray_dpo4rec_stage_size"]) == (5, 20)
        assert values["ray_dpo4rec_training_loss"] == 0.5 and values["ray_dpo4rec_rewards_total"] == 30
        engine = next(tags for name, tags, _ in found if name == "ray_dpo4rec_users_total")
        assert (engine["stage"], engine["round"], engine["engine"]) == ("generate", "1", "engine-7")
        exposed = {name for name, _, _ in found}
        wanted = {name for name in asked_for() if not name.startswith("ray_dpo4rec_serve_")}
        assert len(wanted) > 10 and not wanted - exposed
        ray.cancel(running, force=True)
    finally:
        ray.shutdown()


def test_a_servers_counts_add_up_over_its_nodes(tmp_path: Path) -> None:
    """Two nodes, a replica on each: what both expose adds up to what was asked."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from dpo4rec_ray.serving.loaded_version import Ranking

    class Counting:
        """A replica that counts as ours do, and does nothing else."""

        def __init__(self, folder: str):
            import os

            from dpo4rec_ray.serving.ray_metrics import RayExport
            from dpo4rec_ray.serving.request_metrics import ServingMetrics, WriterMetrics

            own = f"{folder}/{os.getpid()}"
            self._metrics, jobs = ServingMetrics(own), WriterMetrics(own)
            self._exports = [RayExport(self._metrics.registry), RayExport(jobs.registry)]
            jobs.waiting(1)
            jobs.refused("full")
            jobs.failed("engine")
            jobs.written(2.0)
            self._metrics.failed("v1")
            self._metrics.overloaded()

        def __call__(self, _: Any) -> str:
            import numpy as np

            ranking = Ranking(np.array([0, 1]), np.array([1, 0], np.float32), 1, "stored", True)
            self._metrics.answered("v1", ranking, fallback=True, seconds=0.003)
            self._metrics.shadowed("v2", ranking, ranking)
            return ray.get_runtime_context().get_node_id()

        def check_health(self) -> None:
            for export in self._exports:
                export.push()

    ports = [free_port(), free_port()]
    node = {"num_cpus": 1, "object_store_memory": 2**27}
    cluster = Cluster()
    try:
        for port in ports:
            cluster.add_node(**node, metrics_export_port=port, include_dashboard=False)
        ray.init(address=cluster.address, log_to_driver=False)
        options = {"num_replicas": 2, "health_check_period_s": 1, "max_replicas_per_node": 1}
        handle = serve.run(
            serve.deployment(Counting).options(**options).bind(str(tmp_path)), route_prefix=None
        )
        asked = 40
        nodes = [handle.remote(None).result() for _ in range(asked)]
        assert len(set(nodes)) == 2

        def answers(seen: list[Sample]) -> list[Sample]:
            return [one for one in seen if one[0] == "ray_dpo4rec_serve_answers_total"]

        found = wait_for(ports, lambda seen: sum(value for _, _, value in answers(seen)) >= asked)
        assert sum(value for _, _, value in answers(found)) == asked
        by_node = [sum(value for _, _, value in answers(scrape(port))) for port in ports]
        assert all(by_node) and sum(by_node) == asked
        assert {(tags["version"], tags["knowledge"]) for _, tags, _ in answers(found)} == {("v1", "stored")}
        buckets = {
            tags["le"]: value
            for name, tags, value in found
            if name == "ray_dpo4rec_serve_seconds_bucket_total"
        }
        assert set(buckets) >= {"0.005", "+Inf"} and "0.001" not in buckets  # nothing was as fast
        exposed = {name for name, _, _ in found}
        wanted = {name for name in asked_for() if name.startswith("ray_dpo4rec_serve_")}
        assert len(wanted) > 6 and not wanted - exposed
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
