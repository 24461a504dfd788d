"""Experiment trackers: the figures of each optimiser step, and the settings once, in TensorBoard, MLflow or W&B.

One process of a training writes to them. A training that is continued from a checkpoint goes on in the same run, and
no step is there twice. Addresses and keys come from the environment, as each tracker documents; settings hold none.
metrics.jsonl stays the record: a tracker that fails on the way is left, not the training.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

from dpo4rec_ray.errors import UserError

Figures = dict[str, float]
PROJECT = "dpo4rec-ray"  # W&B's project, MLflow's experiment, unless the environment names another

logger = logging.getLogger(__name__)


class TensorBoard:
    """Event files below `folder`/tensorboard, written by tensorboardX, which Ray Train brings along.

    TensorBoard names a run after its folder, so that the run's name is not needed.
    """

    def __init__(self, folder: Path, run_name: str, settings: dict[str, Any]):
        """Raises UserError: the package is missing."""
        self._writer_class = import_tracker("tensorboard").SummaryWriter
        self._folder, self._settings = folder / "tensorboard", settings
        self._writer: Any = None

    def log(self, step: int, figures: Figures) -> None:
        """The figures of optimiser step `step`, counted from 1."""
        if self._writer is None:
            self._writer = self._open(step)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """The training is complete."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, first_step: int) -> Any:
        """A writer whose event file makes TensorBoard drop what earlier files hold from `first_step` on."""
        files = len(list(self._folder.glob("events.out.tfevents.*")))
        writer = self._writer_class(
            str(self._folder),
            purge_step=first_step,
            flush_secs=1,  # what a killed worker loses
            # TensorBoard reads files by name, which otherwise is the second of their making and the host
            filename_suffix=f".{files:04d}",
        )
        if not files:
            text = json.dumps(self._settings, indent=1, sort_keys=True, default=str)
            writer.add_text("settings", "".join(f"    {line}\n" for line in text.splitlines()))
        return writer


class MLflow:
    """A run in the experiment MLFLOW_EXPERIMENT_NAME on MLFLOW_TRACKING_URI; without that, in `folder`/mlflow.db.

    MLflow keeps every value that it is given for a step, and none can be taken back: steps that are computed again
    after a resume are left out, since they repeat the first ones.
    """

    def __init__(self, folder: Path, run_name: str, settings: dict[str, Any]):
        """Raises UserError: the package is missing, the server gives no run, or the run to continue is gone."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # of the package's use, to its makers
        mlflow = import_tracker("mlflow")
        self._error = mlflow.exceptions.MlflowException
        self._metric = mlflow.entities.Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        self._run_file = _RunFile(folder / "mlflow.json")
        self._failed = False
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            if self._run_file.run_id:
                self._client.update_run(self._run_file.run_id, status="RUNNING")
            else:
                self._start(run_name, settings, mlflow.entities.Param)
        except self._error as error:
            raise UserError(
                f"tracker mlflow: {_reason(error)}; {self._run_file.advice('MLFLOW_TRACKING_URI')}"
            ) from None

    def log(self, step: int, figures: Figures) -> None:
        """The figures of optimiser step `step`, counted from 1."""
        if self._failed or step <= self._run_file.step:
            return
        now = int(time.time() * 1000)
        metrics = [self._metric(name, float(value), now, step) for name, value in figures.items()]
        try:
            self._client.log_batch(self._run_file.run_id, metrics=metrics)
        except self._error as error:
            self._failed = True
            logger.warning("tracker mlflow: %s; no figures are sent from step %d on", _reason(error), step)
        else:
            self._run_file.note(step)

    def close(self) -> None:
        """The training is complete."""
        if not self._failed:
            self._client.set_terminated(self._run_file.run_id, "FINISHED")

    def _start(self, run_name: str, settings: dict[str, Any], param: Any) -> None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        run_id = self._client.create_run(experiment, run_name=run_name).info.run_id
        self._client.log_batch(run_id, params=[param(key, value) for key, value in _flat(settings).items()])
        self._run_file.start(run_id)


class WeightsAndBiases:
    """A run in W&B's project WANDB_PROJECT; key, server and mode from WANDB_API_KEY, WANDB_BASE_URL and WANDB_MODE.

    With WANDB_MODE=offline it is written below `folder`/wandb, for `wandb sync`. Neither console output nor code is taken.
    W&B refuses earlier steps: those that are computed again after a resume are left out.
    """

    def __init__(self, folder: Path, run_name: str, settings: dict[str, Any]):
        """Raises UserError: the package is missing, or W&B gives no run (no key, no network)."""
        wandb = import_tracker("wandb")
        self._run_file = _RunFile(folder / "wandb.json")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run_name,
                dir=folder,
                config=settings,
                id=self._run_file.run_id or None,
                resume="allow",
                settings=wandb.Settings(console="off", disable_git=True, disable_code=True),
            )
        except wandb.Error as error:
            raise UserError(
                f"tracker wandb: {_reason(error)}; {self._run_file.advice('WANDB_API_KEY')}"
            ) from None
        if not self._run_file.run_id:
            self._run_file.start(self._run.id)

    def log(self, step: int, figures: Figures) -> None:
        """The figures of optimiser step `step`, counted from 1."""
        if step > self._run_file.step:
            self._run.log(figures, step=step, commit=True)
            self._run_file.note(step)

    def close(self) -> None:
        """The training is complete."""
        self._run.finish()


TRACKERS: dict[str, type] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WeightsAndBiases}


class _RunFile:
    """Which run a training writes to, and the last step there; kept in its folder for a worker that is started again."""

    def __init__(self, file: Path):
        self._file = file
        self.run_id, self.step = "", 0
        if file.exists():
            try:
                stored = json.loads(file.read_text(encoding="utf-8"))
                self.run_id, self.step = str(stored["run_id"]), int(stored["step"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{file}: not a tracker's run ({error}); remove it to start another run"
                ) from None

    def start(self, run_id: str) -> None:
        self.run_id = run_id
        self.note(0)

    def note(self, step: int) -> None:
        self.step = step
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"run_id": self.run_id, "step": step}), encoding="utf-8")
        os.replace(temporary, self._file)

    def advice(self, variable: str) -> str:
        again = f", or remove {self._file} to start another run than {self.run_id}" if self.run_id else ""
        return f"check {variable} and the network{again}"


MODULES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}


def import_tracker(tracker: str) -> Any:
    """The package of a tracker; asked before anything is computed, and again where it is used.

    Raises:
        UserError: it is not installed.
    """
    module = MODULES[tracker]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"dpo.trackers: {tracker} needs the package {module} ({error}); "
            f'pip install {module}, or pip install "dpo4rec-ray[tracking]" for all trackers'
        ) from None


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested tables as {"table.key": value}; MLflow's parameters are strings."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        found |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
        )
    return found


def _reason(error: Exception) -> str:
    """An error's first line without the user and password of addresses in it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"//[^/@\s]*@", "//", lines[0])[:200]
