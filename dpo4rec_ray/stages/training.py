"""Launching training and showing its progress: one Ray Train job, or many small models as Ray tasks.

Rank 0 appends one JSON line per step to metrics.jsonl in the stage's folder, on storage that the driver sees too; the
driver follows that file, because a worker's own output stays in Ray's logs.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpo4rec_ray.stages.common import WORKER_ENV, Progress, check_room, joined_cluster

METRICS = "metrics.jsonl"
# Two data-parallel CPU processes; DeepSpeed reads LOCAL_SIZE and must not look for a GPU.
CPU_TRAIN_ENV = {**WORKER_ENV, "DS_ACCELERATOR": "cpu"}


def launch(
    loop: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    *,
    folder: Path,
    num_workers: int,
    gpus_per_worker: float,
    label: str,
    unit: str,
) -> None:
    """Run `loop(arguments)` on every worker of a TorchTrainer and print a line every few seconds until it ends.

    Raises:
        ray.train.TrainingFailedError: a worker failed; its own exception is inside.
        UserError: more workers than this machine can hold.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    gpu = gpus_per_worker > 0
    check_room(f"{num_workers} workers of {label}", num_workers, num_workers * gpus_per_worker)
    worker_env = dict(WORKER_ENV) if gpu else {**CPU_TRAIN_ENV, "LOCAL_SIZE": str(num_workers)}
    storage = folder / "ray_train"
    trainer = _trainer_class()(
        loop,
        train_loop_config=arguments,
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": 1, **({"GPU": gpus_per_worker} if gpu else {})},
        ),
        run_config=RunConfig(
            name=label,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
            worker_runtime_env={"env_vars": worker_env},
        ),
    )
    stop = threading.Event()
    follower = threading.Thread(target=_follow, args=(folder / METRICS, label, unit, stop), daemon=True)
    follower.start()
    try:
        trainer.fit()
    finally:
        stop.set()
        follower.join(timeout=5)
        shutil.rmtree(storage, ignore_errors=True)  # Ray Train's own bookkeeping; our results are beside it


def _trainer_class() -> type:
    """TorchTrainer, less one callback on a machine of its own.

    Ray 2.60's placement-group cleaner asks "the" Ray on the machine whether its controller lives. When a second Ray
    starts there, it may ask the wrong one, takes the controller for dead and ends the training (seen). On a single
    machine nothing outlives the driver, so there is nothing to clean.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    if joined_cluster():
        return TorchTrainer

    class LocalTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            found = super()._create_default_callbacks()
            return [callback for callback in found if not isinstance(callback, PlacementGroupCleanerCallback)]

    return LocalTrainer


def wait_for_epochs(tasks: Sequence[Any], file: Path, label: str, total: int) -> None:
    """Wait for Ray tasks that append one line per epoch to `file`; `total` epochs at most, fewer if some stop early.

    Raises what a task raised.
    """
    import ray

    waiting = list(tasks)
    with Progress(label, total, "epochs") as progress:
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=1.0)
            ray.get(done)
            if file.exists():
                with open(file, "rb") as lines:
                    progress.at(sum(1 for _ in lines))


class MetricsFile:
    """Appends figures to metrics.jsonl; ranks other than 0 write nothing."""

    def __init__(self, folder: str | Path, rank: int):
        self._file = Path(folder) / METRICS if rank == 0 else None

    def write(self, figures: dict[str, Any]) -> None:
        if self._file is not None:
            with open(self._file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(figures) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of a stage's metrics.jsonl."""
    file = folder / METRICS
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _follow(file: Path, label: str, unit: str, stop: threading.Event) -> None:
    """Print the newest line's step every few seconds."""
    with Progress(label, 0, unit) as progress:
        while not stop.wait(1.0):
            try:
                newest = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
            except (OSError, IndexError, json.JSONDecodeError):
                continue  # not there yet, or a line is half written
            extra = ", ".join(
                f"{key} {newest[key]:.4f}" for key in ("loss", "accuracy", "valid") if key in newest
            )
            progress.at(newest["step"], extra, total=newest["num_steps"])
