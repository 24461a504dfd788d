"""The driver's side of a training: one Ray Train job, restarted where workers die, and a line of progress every few seconds.

Rank 0 appends one JSON line per step to metrics.jsonl in the stage's folder, on storage that the driver sees too. The driver
follows that file, because a worker's own output stays in Ray's logs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from dpo4rec_ray.config.training import TrainerSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store import events
from dpo4rec_ray.store.metrics_file import last_metrics
from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.train.state import checkpoint_storage, read_state, remove_checkpoints, update_state
from dpo4rec_ray.workers.phases import starting
from dpo4rec_ray.workers.placement import WORKER_ENV, check_room, joined_cluster
from dpo4rec_ray.workers.run_metrics import trained
from dpo4rec_ray.workers.stage_workers import trainers

# DeepSpeed must not look for a GPU; `launch` adds LOCAL_SIZE, which it reads too.
CPU_TRAIN_ENV = {**WORKER_ENV, "DS_ACCELERATOR": "cpu"}


def launch(
    loop: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    *,
    folder: Place,
    section: TrainerSection,
    label: str,
    unit: str,
    min_workers: int = 0,
) -> None:
    """Run `loop(arguments)` on every worker of a TorchTrainer, and print a line every few seconds until it ends.

    Workers that die are started again from the last checkpoint, `max_failures` times. A call with the same folder after the
    driver died continues from there too. min_workers: continue with as few workers where there are no more; 0: with all.

    Raises:
        ray.train.TrainingFailedError: a worker failed; its exception is inside.
        UserError: that many workers can never be placed, or one of them raised it.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

    num_workers, gpu = section.num_workers, section.on_gpu
    fewest = min_workers or num_workers
    workers = trainers(section, label, min_workers)
    check_room(workers)
    worker_env = dict(WORKER_ENV) if gpu else {**CPU_TRAIN_ENV, "LOCAL_SIZE": str(num_workers)}
    update_state(folder, refused="")
    trainer = _trainer_class()(
        _refusing(loop, folder),
        train_loop_config=arguments,
        scaling_config=ScalingConfig(
            num_workers=num_workers if fewest == num_workers else (fewest, num_workers),
            use_gpu=gpu,
            resources_per_worker=workers.needs.bundles()[0],
            placement_strategy=section.placement_strategy or "PACK",
            label_selector=workers.needs.labels or None,
        ),
        run_config=RunConfig(
            name=label,
            storage_path=checkpoint_storage(section, folder),
            failure_config=FailureConfig(max_failures=section.max_failures, controller_failure_limit=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": worker_env},
        ),
    )
    continued = _continued_after(folder)
    progress = Progress(label, 0, unit)
    # Ray Train places its workers all at once.
    together = (fewest * section.cpus_per_worker, fewest * section.gpus_per_worker)
    progress.starting = starting(num_workers, *together)
    stop = threading.Event()
    follower = threading.Thread(target=_follow, args=(folder, progress, stop), daemon=True)
    follower.start()
    try:
        trainer.fit()
    finally:
        stop.set()
        follower.join(timeout=5)
        for step in _continued_after(folder)[len(continued) :]:
            events.note("worker_restarted", worker="trainer", after_step=step)
        if refused := _refused(folder):
            raise UserError(refused) from None
    remove_checkpoints(section, folder)


def _refusing(loop: Callable[[dict[str, Any]], None], folder: Place) -> Callable[[dict[str, Any]], None]:
    """The loop, with a user's mistake written to the state: Ray Train would repeat it `max_failures` times."""

    def guarded(arguments: dict[str, Any]) -> None:
        from ray import train

        if _refused(folder):
            return
        try:
            loop(arguments)
        except UserError as error:
            update_state(folder, refused=str(error))
            if train.get_context().get_world_size() > 1:
                raise  # the other workers may be waiting for this one

    return guarded


def _continued_after(folder: Place) -> list[int]:
    state = read_state(folder)
    return state.continued_after if state else []


def _refused(folder: Place) -> str:
    state = read_state(folder)
    return state.refused if state else ""


def _trainer_class() -> type:
    """TorchTrainer; without one of its callbacks where Ray runs on this machine alone.

    Ray 2.60's placement-group cleaner asks the Ray on this machine whether the training's controller is alive. When a second
    Ray starts here, the cleaner may ask the wrong one, believe that the controller is dead, and end the training (this has
    happened). On a single machine nothing outlives the driver, so there is nothing to clean.
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


def _follow(folder: Place, progress: Progress, stop: threading.Event) -> None:
    """Print the newest step of metrics.jsonl every few seconds."""
    with progress:
        while not stop.wait(1.0):
            newest = last_metrics(folder)
            if newest is None:
                continue
            extra = ", ".join(f"{key} {newest[key]:.4f}" for key in ("loss", "accuracy") if key in newest)
            progress.at(newest["step"], extra, total=newest["num_steps"])
            trained(newest)
