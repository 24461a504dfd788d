"""What starting workers say of themselves reaches the driver's progress line, on a real Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.workers import phases
from dpo4rec_ray.workers.phases import phase, starting
from dpo4rec_ray.workers.shards import Pool, run_shards
from tests.conftest import local_ray


@pytest.fixture(scope="module")
def ray_local() -> Iterator[None]:
    with local_ray(1):
        yield


def worker() -> type:
    """Made inside a function, so that it travels by value."""

    class Worker:
        def __init__(self, gate: str):
            import time
            from pathlib import Path

            from dpo4rec_ray.workers.phases import phase

            phase("importing vLLM")
            phase("loading a model")  # the newest counts
            while not Path(gate).exists():
                time.sleep(0.05)
            phase("ready")

        def __call__(self, row: dict) -> dict:
            return {"shard": int(row["shard"]), "users": 1}

        def ping(self) -> None:
            """Returns when the constructor has."""

    return Worker


def until(line: Callable[[], str], wanted: str) -> None:
    deadline = time.monotonic() + 60
    while line() != wanted:
        assert time.monotonic() < deadline, line()
        time.sleep(0.05)


@pytest.mark.ray
def test_from_a_process_to_ready(ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    line = starting(2)
    assert line() == "2 waiting for a process"
    actor = ray.remote(worker()).options(num_cpus=1)
    first = actor.remote(str(tmp_path / "gate"))
    until(line, "1 loading a model, 1 waiting for a process")
    monkeypatch.setattr(phases, "joined_cluster", lambda: True)
    second = actor.remote(str(tmp_path / "gate"))
    until(line, "1 loading a model, 1 waiting for a free CPU")
    assert starting(1, 0, 1)() == "1 waiting for 1 GPUs, and the nodes have 0", (
        "a new start has forgotten the workers before it"
    )
    (tmp_path / "gate").touch()
    ray.get(first.ping.remote())
    assert line() == "1 ready, 1 waiting for a free CPU"
    ray.kill(first)
    ray.get(second.ping.remote())
    assert line() == "2 ready"
    ray.kill(second)


@pytest.mark.ray
def test_a_pool_of_shards_tells_the_progress_line(ray_local: None, tmp_path: Path) -> None:
    class Watched(Progress):
        def __enter__(self) -> Progress:
            until(self.starting, "1 waiting for a process")
            return super().__enter__()

    gate, progress = tmp_path / "gate", Watched("test", 1, "users")
    gate.touch()
    rows = run_shards([(0, 0, 1)], [Pool(worker(), {"gate": str(gate)}, size=1, num_cpus=1)], progress)
    assert [row["shard"] for row in rows] == [0]
    assert progress.starting() == "1 ready"


def test_without_ray_nothing_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.experimental import internal_kv

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(internal_kv, "_internal_kv_put", lambda *_, **__: pytest.fail("noted"))
    phase("anything")
