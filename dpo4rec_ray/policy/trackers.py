"""Experiment trackers: the metrics of each optimiser step, and the settings once, in TensorBoard, MLflow or W&B.

One process of a training writes to them. A training that is continued from a checkpoint continues the same run, and no step
is there twice. Addresses and keys come from the environment, as each tracker documents; settings hold none.
metrics.jsonl stays the record: when a tracker fails during a training, nothing more is sent to it, and training continues.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from dpo4rec_ray.errors import UserError, first_line
from dpo4rec_ray.policy.objectives import Metrics
from dpo4rec_ray.storage.places import copy_folder, is_remote, new_file

PROJECT = "dpo4rec-ray"  # W&B's project, MLflow's experiment, unless the environment names another

logger = logging.getLogger(__name__)


class TensorBoard:
    """Event files below `folder`/tensorboard, written by tensorboardX, which Ray Train brings along.

    TensorBoard names a run after its folder, so that the run's name is not needed.
    """

    def __init__(self, folder: Path, run_name: str, settings: dict[str, Any]):
        """Raises UserError: the package is missing."""
        self._writer_class = import_tracker("tensorboard").SummaryWriter
        self._target, self._settings = folder / "tensorboard", settings
        # An object store knows no append: there the files follow when the training is complete.
        self._folder = Path(tempfile.mkdtemp()) if is_remote(folder) else self._target
        self._writer: Any = None

    def log(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of optimiser step `step`, counted from 1."""
        if self._writer is None:
            self._writer = self._open(step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Call when the training is complete."""
        if self._writer is not None:
            self._writer.close()
            if self._folder != self._target:
                copy_folder(self._folder, self._target)

    def _open(self, first_step: int) -> Any:
        """A writer whose event file makes TensorBoard drop what earlier files hold from `first_step` on."""
        files = len(list(self._folder.glob("events.out.tfevents.*")))
        writer = self._writer_class(
            str(self._folder),
            purge_step=first_step,
            flush_secs=1,  # a killed worker loses this much
            # TensorBoard reads files in the order of their names, which otherwise hold the second and the host
            filename_suffix=f".{files:04d}",
        )
        if not files:
            text = json.dumps(self._settings, indent=1, sort_keys=True, default=str)
            writer.add_text("settings", "".join(f"    {line}\n" for line in text.splitlines()))
        return writer


class _Run:
    """A tracker's run: the same after a restart, with every step once. After its first failure nothing more is sent."""

    name: ClassVar[str]

    def __init__(self, folder: Path):
        self._run_file = _RunFile(folder / f"{self.name}.json")
        self._failed = False

    def log(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of optimiser step `step`, counted from 1."""
        if step > self._run_file.step and self._attempt(
            lambda: self._send(step, metrics), f"from step {step} on"
        ):
            self._run_file.note(step)

    def close(self) -> None:
        """Call when the training is complete."""
        self._attempt(self._end, "at the end")

    def _attempt(self, call: Callable[[], None], when: str) -> bool:
        if not self._failed:
            try:
                call()
            # errors of the tracker, its network or its database: none of them may end the training
            except Exception as error:
                self._failed = True
                logger.warning("tracker %s: %s; nothing is sent %s", self.name, _reason(error), when)
        return not self._failed

    def _send(self, step: int, metrics: Metrics) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError


class MLflow(_Run):
    """A run in the experiment MLFLOW_EXPERIMENT_NAME on MLFLOW_TRACKING_URI; without that, in `folder`/mlflow.db.

    MLflow keeps every value that it gets for a step, and values cannot be removed: steps that are computed again after a
    resume are not sent, since they have the same values.
    """

    name = "mlflow"

    def __init__(self, folder: Path, run_name: str, settings: dict[str, Any]):
        """Raises UserError: the package is missing, the server gives no run, or the run to continue is gone."""
        self._mlflow = import_tracker(self.name)
        super().__init__(folder)
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri and is_remote(folder):
            raise UserError(f"{folder}: MLflow has no database on an object store; set MLFLOW_TRACKING_URI")
        uri = uri or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        try:
            self._client = self._mlflow.MlflowClient(tracking_uri=uri)
            if self._run_file.run_id:
                self._client.update_run(self._run_file.run_id, status="RUNNING")
            else:
                self._run_file.start(self._start(run_name, settings))
        except self._mlflow.exceptions.MlflowException as error:
            raise self._run_file.refused(self.name, error, "MLFLOW_TRACKING_URI") from None

    def _start(self, run_name: str, settings: dict[str, Any]) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        run_id = self._client.create_run(experiment, run_name=run_name).info.run_id
        params = [self._mlflow.entities.Param(key, str(value)) for key, value in settings.items()]
        self._client.log_batch(run_id, params=params)
        return run_id

    def _send(self, step: int, metrics: Metrics) -> None:
        now = int(time.time() * 1000)
        entity = self._mlflow.entities.Metric
        entities = [entity(name, float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_file.run_id, metrics=entities)

    def _end(self) -> None:
        self._client.set_terminated(self._run_file.run_id, "FINISHED")


class WeightsAndBiases(_Run):
    """A run in W&B's project WANDB_PROJECT; key, server and mode from WANDB_API_KEY, WANDB_BASE_URL and WANDB_MODE.

    With WANDB_MODE=offline it is written below `folder`/wandb, for `wandb sync`. Console output, code and command line
    are not sent. W&B ignores steps that it already has; after a resume these are computed again, with the same values.
    """

    name = "wandb"

    def __init__(self, folder: Path, run_name: str, settings: dict[str, Any]):
        """Raises UserError: the package is missing, or W&B gives no run (no key, no network)."""
        self._wandb = wandb = import_tracker(self.name)
        super().__init__(folder)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run_name,
                dir=tempfile.mkdtemp() if is_remote(folder) else folder,
                config=settings,
                id=self._run_file.run_id or None,
                resume="allow",
                settings=wandb.Settings(
                    console="off",
                    disable_git=True,
                    disable_code=True,
                    x_disable_meta=True,  # the command line, and a Ray worker's has the cluster's password
                    x_transaction_log_flush_interval=1.0,  # seconds: a killed worker loses this much, offline
                ),
            )
        except wandb.Error as error:
            raise self._run_file.refused(self.name, error, "WANDB_API_KEY") from None
        if not self._run_file.run_id:
            self._run_file.start(self._run.id)
        elif not self._run.offline:
            self._run_file.step = 0  # the server knows what it has

    def _send(self, step: int, metrics: Metrics) -> None:
        self._run.log(metrics, step=step, commit=True)

    def _end(self) -> None:
        self._run.finish()
        self._wandb.teardown()  # its process still writes after finish(), and Ray ends a worker's children with the worker


TRACKERS: dict[str, type] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WeightsAndBiases}


class _RunFile:
    """The run that a training writes to, and its last step; kept in the training's folder for a restarted worker."""

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
        with new_file(self._file) as temporary:
            temporary.write_text(json.dumps({"run_id": self.run_id, "step": step}), encoding="utf-8")

    def refused(self, tracker: str, error: Exception, variable: str) -> UserError:
        again = f", or remove {self._file} to start another run than {self.run_id}" if self.run_id else ""
        return UserError(f"tracker {tracker}: {_reason(error)}; check {variable} and the network{again}")


# Switches off what the packages report to their makers.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
MODULES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}


def import_tracker(tracker: str) -> Any:
    """The package of a tracker.

    Raises:
        UserError: it is not installed.
    """
    check_tracker(tracker)
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    return importlib.import_module(MODULES[tracker])


def check_tracker(tracker: str) -> None:
    """Check that its package is installed, without importing it, which takes seconds.

    Raises:
        UserError: it is not installed.
    """
    module = MODULES[tracker]
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"policy.trackers: {tracker} needs the package {module}, which is not installed; "
            f'pip install {module}, or pip install "dpo4rec-ray[tracking]" for all trackers'
        )


def _reason(error: Exception) -> str:
    """An error's first line, without the user names and passwords in its addresses."""
    return re.sub(r"//[^/@\s]*@", "//", first_line(error))[:200]
