"""Where work may run: the room on this machine or cluster, and the environment of worker processes."""

from __future__ import annotations

import os
import sys

from dpo4rec_ray.config import Config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.workers.needs import Needs
from dpo4rec_ray.workers.nodes import nodes_that_may_come, nodes_there
from dpo4rec_ray.workers.room import ALL, Workers, how_many_fit, refusal

# Worker processes must not start a thread per core each, nor talk to a hub, nor report usage.
WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


_kept: list[Workers] = []  # what `reserve_room` has noted


def joined_cluster() -> bool:
    """Whether this job runs on a cluster that was there before it, and that may still grow."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"))


def check_room(*groups: Workers) -> list[int]:
    """How many workers of each group can run at the same time, on the nodes that there are or that may come.

    Where an autoscaler may add nodes and does not say which, all of them can.

    Raises:
        UserError: too few of them can ever run beside what is reserved.
    """
    nodes = nodes_there()
    here = "the nodes are" if len(nodes) > 1 else "this machine has"
    if joined_cluster():
        coming = nodes_that_may_come(nodes)
        if coming is None:
            return [group.count for group in groups]
        if coming:
            here = "the nodes, with those that the autoscaler may add, are"
        nodes += coming
    together = [*_kept, *groups]
    if reason := refusal(together, nodes, here):
        raise UserError(reason)
    return how_many_fit(together, nodes)[len(_kept) :]


def pool_workers(what: str, size: int, needs: Needs, keys: str, min_size: int = 0) -> Workers:
    """Workers of a pool. On a cluster, whose nodes go and come, one of them is enough to go on, or `min_size`."""
    return Workers(what, size, needs, keys, min_size or (1 if joined_cluster() else ALL))


def reserve_room(workers: Workers) -> None:
    """Note what actors hold that outlive a stage (generate.keep_engines); later stages cannot have it."""
    _kept.append(workers)


def release_room() -> None:
    """Give back what was reserved."""
    _kept.clear()


def without_sklearn() -> None:
    """Keep transformers in this worker process from importing scikit-learn, which costs 1.5 s and serves nothing here."""
    sys.modules.setdefault("sklearn", None)  # type: ignore[arg-type]  # how Python marks what cannot be imported


def engine_env(config: Config) -> dict[str, str]:
    """Environment of a vLLM worker. On CPU the fastest measured settings, unless the driver's environment has others."""
    env = dict(WORKER_ENV)
    if not config.generate.gpus_per_engine:
        env |= {
            # More threads than cores stall everything.
            "OMP_NUM_THREADS": str(max(1, int(config.generate.cpus_per_engine))),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": str(config.generate.kv_cache_gib),
        }
    passed_on = (*(name for name in env if name.startswith("VLLM_")), "HF_HOME", "HF_HUB_OFFLINE")
    return env | {name: os.environ[name] for name in passed_on if name in os.environ}
