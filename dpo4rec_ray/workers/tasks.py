"""Work in Ray tasks: one call in a process of its own, or small models that are each trained by one, and their progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store.metrics_file import count_metrics
from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.workers.needs import Needs
from dpo4rec_ray.workers.phases import FIRST_WORK, phase, starting
from dpo4rec_ray.workers.placement import WORKER_ENV, check_room
from dpo4rec_ray.workers.room import Workers

T = TypeVar("T")
ONE_CPU = Needs()


def in_worker(
    work: Callable[..., T], *arguments: Any, needs: Needs = ONE_CPU, env: dict[str, str] = WORKER_ENV
) -> T:
    """What `work(*arguments)` returns in a process of its own, which then ends."""
    import ray

    task = ray.remote(**needs.options(), max_calls=1, runtime_env={"env_vars": env})(work)
    return ray.get(task.remote(*arguments))


def run_tasks(
    work: Callable[..., None],
    shared: Any,
    jobs: Sequence[tuple],
    *,
    workers: Workers,
    label: str,
    folder: Place,
    total: int,
) -> None:
    """Run `work(shared, *job)` for every job, each as a Ray task. Raises what a task raised.

    Args:
        workers: the tasks that run at the same time, for the room that each needs.
        label: name of the stage, for the terminal.
        folder: where each task writes one line per epoch (store/metrics_file.py).
        total: epochs of all tasks together, if none stops early.

    Raises:
        UserError: no node can hold a task.
    """
    import ray

    check_room(workers)
    task = ray.remote(**workers.needs.options(), runtime_env={"env_vars": WORKER_ENV})(_begun)
    progress = Progress(label, total, "epochs")
    progress.starting = starting(1, workers.needs.num_cpus, workers.needs.num_gpus)
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
