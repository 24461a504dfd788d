"""Which kept engine a sampling actor gets: one each, and after a restart the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from dpo4rec_ray.knowledge.engine_spec import ServedWeights
from dpo4rec_ray.texts.engines import KeptEngine, KeptGenerator
from tests.conftest import local_ray


def without_llm() -> type:
    """Made inside a function, so that it travels to Ray's workers by value."""

    class WithoutLLM(KeptEngine):
        def __init__(self):
            self._owner, self._lock = "", threading.Lock()

    return WithoutLLM


@pytest.fixture
def ray_local() -> Iterator[None]:
    with local_ray(1):
        yield


@pytest.mark.ray
def test_one_engine_for_each_owner(ray_local: None) -> None:
    """An owner that comes early takes one engine, however late the others are."""
    import ray

    actor = ray.remote(without_llm()).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
    engines = [actor.remote(), actor.remote()]
    first, second, again = (
        KeptGenerator(engines, ServedWeights("m"), name)._engine for name in ("a", "b", "a")
    )
    assert [first, second, again] == [engines[0], engines[1], engines[0]]
    ray.kill(engines[0], no_restart=False)  # it comes back, and knows no owner
    while ray.get(engines[0].owner.remote()):
        time.sleep(0.05)  # Ray kills it some time after the call
    other, own = (KeptGenerator(engines, ServedWeights("m"), name)._engine for name in ("b", "a"))
    assert [own, other] == engines, "b still has its own, which lived"
    with pytest.raises(RuntimeError, match="none of 2 engines is free for c"):
        KeptGenerator(engines, ServedWeights("m"), "c")
