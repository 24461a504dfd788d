"""Where work may run: resources of this machine or cluster, and the environment of worker processes."""

from __future__ import annotations

import os
import sys

from dpo4rec_ray.config import Config
from dpo4rec_ray.errors import UserError

# Worker processes must not start a thread per core each, nor talk to a hub, nor report usage.
WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

_reserved: dict[str, float] = {}  # "CPU", "GPU" -> how many `reserve_room` has taken


def joined_cluster() -> bool:
    """Whether this job runs on a cluster that was there before it, and that may still grow."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"))


def check_room(what: str, num_cpus: float, num_gpus: float) -> None:
    """Refuse work that this machine can never start: Ray would wait for ever. A cluster may grow and refuses nothing.

    Raises:
        UserError: more CPUs or GPUs are wanted than there are, less what is reserved.
    """
    import ray

    if joined_cluster():
        return
    have = ray.cluster_resources()
    for kind, need in (("CPU", num_cpus), ("GPU", num_gpus)):
        taken = _reserved.get(kind, 0)
        free = have.get(kind, 0) - taken
        if need > free:
            kept = f" free of {have.get(kind, 0):g} (generate.keep_engines)" if taken else ""
            raise UserError(
                f"{what} need {need:g} {kind}s, this machine has {free:g}{kept}; lower the number of workers or "
                f"their share in the recipe (num_engines, num_workers, cpus_per_engine, gpus_per_worker, ...)"
            )


def reserve_room(num_cpus: float, num_gpus: float) -> None:
    """Note what actors hold that outlive a stage (generate.keep_engines); later stages cannot have it."""
    _reserved.update(CPU=num_cpus, GPU=num_gpus)


def release_room() -> None:
    """Give back what was reserved."""
    _reserved.clear()


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
