"""What Ray's dashboard and Prometheus see of the sampling actors."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections import Counter

import pytest

from dpo4rec_ray.texts.gauges import Gauges

pytestmark = [pytest.mark.ray]


def test_counts_and_levels_are_exported() -> None:
    import ray

    def sample_for_a_while() -> None:  # inside: workers cannot import the tests
        gauges = Gauges("engine-7")
        gauges.count(Counter(users=3, samples=30, tokens=900))
        gauges.engine(busy=0.75, running=12.5, kv_cache=0.25)
        time.sleep(60)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=2**27,
        _metrics_export_port=port,
    )
    try:
        running = ray.remote(sample_for_a_while).remote()
        wanted = {
            "ray_dpo4rec_users_total": 3,
            "ray_dpo4rec_samples_total": 30,
            "ray_dpo4rec_tokens_total": 900,
            "ray_dpo4rec_engine_busy": 0.75,
            "ray_dpo4rec_engine_running": 12.5,
            "ray_dpo4rec_engine_kv_cache": 0.25,
        }
        found: dict[str, float] = {}
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and found != wanted:
            time.sleep(1)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                    lines = answer.read().decode().splitlines()
            except OSError:
                continue  # the endpoint is not up yet
            ours = [line for line in lines if 'engine="engine-7"' in line]
            found = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in ours}
        assert found == wanted
        ray.cancel(running, force=True)
    finally:
        ray.shutdown()
