"""Runs a trainer inside a Ray Train worker: continues it from a checkpoint, saves checkpoints, and records every step."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo4rec_ray.config.training import TrainerSection
from dpo4rec_ray.policy.objectives import Metrics
from dpo4rec_ray.policy.trainer import FirstFigure, Trainer
from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store.metrics_file import MetricsFile, read_metrics
from dpo4rec_ray.train.state import read_state, update_state


class Observer:
    """What one kind of training adds to its steps; this one adds nothing. Every worker has one."""

    def restore(self, line: dict[str, Any]) -> None:
        """Take the line of metrics.jsonl of a step that was done before the training was continued."""

    def after_step(self, step: int, num_steps: int, metrics: Metrics) -> tuple[dict[str, Any], bool]:
        """What to add to the step's line, and whether to stop. All workers must return the same answer."""
        return {}, False


def run_resumable(
    trainer: Trainer,
    section: TrainerSection,
    folder: Place,
    run_name: str,
    observer: Observer,
    *,
    trackers: Sequence[str] = (),
    expect_first: FirstFigure | None = None,
) -> None:
    """Run the trainer to its end, from Ray Train's checkpoint if there is one. Every worker calls it.

    Rank 0 writes metrics.jsonl and the state in `folder`, and sends the metrics to these trackers as `run_name`.
    Steps beyond the checkpoint are done again, and so are their lines and what they hold.
    """
    from ray import train

    from dpo4rec_ray.policy.trackers import TRACKERS

    rank = train.get_context().get_world_rank()
    checkpoint = train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as saved:
            trainer.load(Path(saved))
    metrics_file = MetricsFile(folder, rank)
    metrics_file.go_on_after(trainer.step)
    opened = []
    if rank == 0:
        state = read_state(folder)
        continued = [] if state is None else state.continued_after
        if checkpoint is not None:
            continued = [*continued, trainer.step]
        update_state(folder, continued_after=continued, result=None)
        settings = section.model_dump(mode="json")
        opened = [TRACKERS[name](folder, run_name, settings) for name in trackers]
    for line in read_metrics(folder):
        if line["step"] <= trainer.step:
            observer.restore(line)

    def after_step(step: int, num_steps: int, metrics: Metrics) -> bool:
        own = {**metrics, "peak_memory_mb": peak_memory_mb()}
        more, stop = observer.after_step(step, num_steps, own)
        metrics_file.write({"step": step, "num_steps": num_steps, **own, **more})
        for tracker in opened:
            tracker.log(step, own)
        if step % section.checkpoint_every == 0 and step < num_steps and not stop:
            metrics_file.flush()
            with tempfile.TemporaryDirectory() as saved:
                trainer.save(Path(saved))
                train.report({"step": step}, checkpoint=train.Checkpoint.from_directory(saved))
        return stop

    trainer.run(after_step, expect_first=expect_first)
    metrics_file.flush()
    for tracker in opened:
        tracker.close()


def quiet_deepspeed() -> None:
    """DeepSpeed logs every detail at INFO; only errors matter here."""
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)


def peak_memory_mb() -> float:
    """Peak device memory of this worker in MiB, or on the CPU the peak resident size of its process."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
