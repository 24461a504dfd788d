"""Launching training and showing its progress: one Ray Train job, or many small models as Ray tasks.

Rank 0 appends one JSON line per step to metrics.jsonl in the stage's folder, on storage that the driver sees too; the
driver follows that file, because a worker's own output stays in Ray's logs.
"""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo4rec_ray.config.training import TrainerSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store.artifacts import MANIFEST, RunDir, write_json
from dpo4rec_ray.store.metrics_file import METRICS
from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.workers.placement import WORKER_ENV, check_room, joined_cluster

# Whose training the folder holds, and an id that keeps its checkpoints apart from any other's on storage that many share.
TRAINING = "training.json"
WARNINGS = "warnings"  # of a step, beside its figures
LAST_LINES = 8192  # bytes that hold the last line
REFUSED = "refused.txt"  # why a worker would not train: the user's mistake
# Two data-parallel CPU processes; DeepSpeed reads LOCAL_SIZE and must not look for a GPU.
CPU_TRAIN_ENV = {**WORKER_ENV, "DS_ACCELERATOR": "cpu"}


def begin(store: RunDir, name: str, round_id: int = 0) -> Path:
    """The artifact's folder: as an interrupted run of the same work left it, to continue, or empty."""
    folder = store.path(name, round_id)
    note = folder / TRAINING
    begun = json.loads(note.read_text()) if note.exists() else {}
    same = begun.get("fingerprint") == store.fingerprint and not (folder / MANIFEST).exists()
    store.start(name, round_id, keep=same)
    if not same:
        write_json(note, {"fingerprint": store.fingerprint, "id": uuid.uuid4().hex})
    return folder


def launch(
    loop: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    *,
    folder: Path,
    section: TrainerSection,
    label: str,
    unit: str,
    min_workers: int = 0,
) -> None:
    """Run `loop(arguments)` on every worker of a TorchTrainer and print a line every few seconds until it ends.

    Workers that die are started again from the last checkpoint, `max_failures` times; called again with the same folder
    after the driver died, it goes on from there too. min_workers: go on with as few where there are no more; 0: with all.

    Raises:
        ray.train.TrainingFailedError: a worker failed; its own exception is inside.
        UserError: more workers than this machine can hold, or a worker raised one.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

    num_workers, gpu = section.num_workers, section.gpus_per_worker > 0
    fewest = min_workers or num_workers
    check_room(f"{fewest} workers of {label}", fewest, fewest * section.gpus_per_worker)
    worker_env = dict(WORKER_ENV) if gpu else {**CPU_TRAIN_ENV, "LOCAL_SIZE": str(num_workers)}
    if not (folder / TRAINING).exists():
        write_json(folder / TRAINING, {"id": uuid.uuid4().hex})
    storage = _storage(section, folder)
    refused = folder / REFUSED
    refused.unlink(missing_ok=True)
    trainer = _trainer_class()(
        _telling(loop, refused),
        train_loop_config=arguments,
        scaling_config=ScalingConfig(
            num_workers=num_workers if fewest == num_workers else (fewest, num_workers),
            use_gpu=gpu,
            resources_per_worker={"CPU": 1, **({"GPU": section.gpus_per_worker} if gpu else {})},
        ),
        run_config=RunConfig(
            name=label,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=section.max_failures, controller_failure_limit=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
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
        if refused.exists():
            raise UserError(refused.read_text(encoding="utf-8")) from None
    remove_checkpoints(section, folder)


def _telling(loop: Callable[[dict[str, Any]], None], refused: Path) -> Callable[[dict[str, Any]], None]:
    """The loop, with a user's mistake written to a file: Ray Train would try it again, `max_failures` times."""

    def told(arguments: dict[str, Any]) -> None:
        from ray import train

        if refused.exists():
            return
        try:
            loop(arguments)
        except UserError as error:
            refused.write_text(str(error), encoding="utf-8")
            if train.get_context().get_world_size() > 1:
                raise  # the others may be waiting for this one

    return told


def _storage(section: TrainerSection, folder: Path) -> str:
    """Where checkpoints go: a folder, or a URI, of this training alone."""
    if not section.storage_path:
        return str(folder / "ray_train")
    path = section.storage_path.rstrip("/")
    if "://" not in path:
        path = str(Path(path).expanduser().resolve())
    return f"{path}/{json.loads((folder / TRAINING).read_text())['id']}"


def remove_checkpoints(section: TrainerSection, folder: Path) -> None:
    """Remove what only a training that goes on needs: checkpoints, and Ray Train's own bookkeeping beside them."""
    from pyarrow.fs import FileSystem, FileType

    storage = _storage(section, folder)
    if "://" not in storage:
        shutil.rmtree(storage, ignore_errors=True)
        return
    filesystem, path = FileSystem.from_uri(storage)
    if filesystem.get_file_info(path).type == FileType.Directory:
        filesystem.delete_dir(path)


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


def _follow(file: Path, label: str, unit: str, stop: threading.Event) -> None:
    """Print the newest line's step every few seconds."""
    with Progress(label, 0, unit) as progress:
        while not stop.wait(1.0):
            try:
                with open(file, "rb") as lines:
                    lines.seek(max(0, file.stat().st_size - LAST_LINES))
                    newest = json.loads(lines.read().splitlines()[-1])
            except (OSError, IndexError, ValueError):
                continue  # not there yet, or a line is half written
            extra = ", ".join(
                f"{key} {newest[key]:.4f}" for key in ("loss", "accuracy", "valid") if key in newest
            )
            progress.at(newest["step"], extra, total=newest["num_steps"])
