from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_ray.store import events
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.texts.throughput import Throughput


def answer(engine: str, engine_tokens: int, span_s: float, **counts: int) -> dict[str, object]:
    stats = {"busy": 0.5, "running": 3.0, "kv_cache": 0.1, "prefix_hits": 0.9, "start_s": 4.0}
    return {
        **counts,
        "engine": engine,
        "engine_tokens": engine_tokens,
        "engine_samples": engine_tokens // 10,
        "span_s": span_s,
        **stats,
    }


def test_counts_add_up_and_an_engine_counts_once() -> None:
    done = Throughput(num_engines=2)
    done.add(answer("a", 100, 1.0, users=2, tokens=100, failed=1))
    done.add(answer("a", 300, 2.0, users=3, tokens=200))
    done.add(answer("b", 100, 2.0, users=1, tokens=100))
    assert (done.total["users"], done.total["tokens"], done.total["failed"]) == (6, 400, 1)
    assert done.stats["tokens_per_s"] == 200, "100 + 300 tokens by two engines in 2 s each"
    assert done.line == "20 samples/s, 200 tokens/s, engines busy 50% to 50%, KV cache 10% to 10%"


def test_a_replaced_engine_is_no_second_one() -> None:
    done = Throughput(num_engines=1)
    done.add(answer("a", 100, 1.0))
    done.add(answer("successor", 100, 1.0))
    assert done.stats["tokens_per_s"] == pytest.approx(100)


def test_an_engine_that_got_no_shard_does_no_work() -> None:
    done = Throughput(num_engines=8)
    done.add(answer("a", 100, 1.0))
    assert done.stats["tokens_per_s"] == pytest.approx(100)


def test_without_engines_there_is_nothing_to_say() -> None:
    done = Throughput(num_engines=1)
    assert done.line == ""
    done.add({"users": 5, "samples": 10, "engine": ""})
    assert done.stats == {}
    assert done.line == "", "a rate needs a second"


def test_engines_and_users_set_aside_are_events(tmp_path: Path) -> None:
    store = RunDir(tmp_path)
    with events.recorded(store):
        two = Throughput(2)
        for engine in ("gpu-1-70", "gpu-2-71", "gpu-1-70", "gpu-1-99"):
            two.add(answer(engine, 100, 1.0, shard=7, failed=int(engine == "gpu-2-71")))
    driver, *found, _ = events.read_events(store)
    assert [
        (line["event"], line["node"], line.get("worker") or (line["shard"], line["users"])) for line in found
    ] == [
        ("worker_started", "gpu-1", "gpu-1-70"),
        ("set_aside", driver["node"], (7, 1)),
        ("worker_started", "gpu-2", "gpu-2-71"),
        ("worker_restarted", "gpu-1", "gpu-1-99"),
    ]
