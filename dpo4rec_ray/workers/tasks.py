"""Work in Ray tasks: one call in a process of its own, or small models that are each trained by one, and their progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store.metrics_file import count_metrics
from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.workers.phases import FIRST_WORK, phase, starting
from dpo4rec_ray.workers.placement import WORKER_ENV, check_room

T = TypeVar("T")


def in_worker(
    work: Callable[..., T], *arguments: Any, gpus: float = 0.0, env: dict[str, str] = WORKER_ENV
) -> T:
    """What `work(*arguments)` returns in a process of its own with one CPU, which then ends."""
    import ray

    task = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1, runtime_env={"env_vars": env})(work)
    return ray.get(task.remote(*arguments))


def run_tasks(
    work: Callable[..., None],
    shared: Any,
    jobs: Sequence[tuple],
    *,
    gpus: float,
    label: str,
    folder: Place,
    total: int,
) -> None:
    """Run `work(shared, *job)` for every job, each as a Ray task with one CPU. Raises what a task raised.

    Args:
        gpus: GPUs of each task.
        label: name of the stage, for the terminal.
        folder: where each task writes one line per epoch (store/metrics_file.py).
        total: epochs of all tasks together, if none stops early.

    Raises:
        UserError: a task needs more than this machine has.
    """
    import ray

    check_room(f"the tasks of {label}", 1, gpus)
    task = ray.remote(num_cpus=1, num_gpus=gpus, runtime_env={"env_vars": WORKER_ENV})(_begun)
    progress = Progress(label, total, "epochs")
    progress.starting = starting(1, 1, gpus)
    reference = ray.put(shared)
    waiting = [task.remote(work, reference, *job) for job in jobs]
    with progress:
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=1.0)
            ray.get(done)
            progress.at(count_metrics(folder))


def _begun(work: Callable[..., None], *arguments: Any) -> None:
    phase(FIRST_WORK)
    work(*arguments)
