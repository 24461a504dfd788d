"""What the workers of a job do before their first result, for the progress line: kept in Ray's own key-value store."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable

from dpo4rec_ray.workers.placement import joined_cluster

READY, FIRST_WORK = "ready", "at the first results"
_SPACE = b"dpo4rec_phases"


def phase(doing: str) -> None:
    """Note what this worker does from now on ("importing vLLM"). Without Ray, nothing."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_put

    if ray.is_initialized():
        context = ray.get_runtime_context()
        _internal_kv_put(
            _prefix() + (context.get_actor_id() or context.get_worker_id()), doing, namespace=_SPACE
        )


def starting(num_workers: int, num_cpus: float = 1.0, num_gpus: float = 0.0) -> Callable[[], str]:
    """For `Progress.starting`: how many of `num_workers` that start from now on are in which phase.

    num_cpus, num_gpus: what has to be free for the next of them to be placed.
    """
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(_prefix(), del_by_prefix=True, namespace=_SPACE)

    def line() -> str:
        with contextlib.suppress(Exception):  # a line on the terminal must end no run
            counts = Counter(_phases())
            waiting = num_workers - counts.total()
            if waiting > 0:
                counts[f"waiting for {_lacking(num_cpus, num_gpus)}"] = waiting
            return ", ".join(f"{count} {doing}" for doing, count in counts.items())
        return ""

    return line


def _phases() -> list[str]:
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

    found = [
        _internal_kv_get(key, namespace=_SPACE) for key in _internal_kv_list(_prefix(), namespace=_SPACE)
    ]
    return [doing.decode() for doing in found if doing]


def _lacking(num_cpus: float, num_gpus: float) -> str:
    """What a worker without a process waits for. Only a cluster takes on more than it has room for (`check_room`)."""
    import ray

    if joined_cluster():
        free, there = ray.available_resources(), ray.cluster_resources()
        for kind, need in (("GPU", num_gpus), ("CPU", num_cpus)):
            if need > there.get(kind, 0):
                return f"{need:g} {kind}s, and the nodes have {there.get(kind, 0):g}"
            if free.get(kind, 0) < need:
                return f"a free {kind}"
    return "a process"


def _prefix() -> str:
    import ray

    return f"{ray.get_runtime_context().get_job_id()}/"
