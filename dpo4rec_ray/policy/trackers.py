"""Experiment trackers: the metrics of each optimiser step or the figures of a whole run, in TensorBoard, MLflow or W&B.

A training, in one of its processes, writes with `log`; the driver of a run with `add` and `link` (report/tracking.py). What is
continued after a kill continues the same run, and no step is there twice. Addresses and keys come from the environment, as each
tracker documents; settings hold none.
metrics.jsonl stays the record: when a tracker fails during a training, nothing more is sent to it, and training continues.
"""

from __future__ import annotations

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
from dpo4rec_ray.policy.tracker_packages import import_tracker
from dpo4rec_ray.storage.places import copy_folder, is_complete, is_remote, new_file

PROJECT = "dpo4rec-ray"  # W&B's project, MLflow's experiment, unless the environment names another
EVENT_FILES = "events.out.tfevents.*"
MLFLOW_PARAMS = 100  # most that one call takes

logger = logging.getLogger(__name__)


class TensorBoard:
    """Event files below `folder`/tensorboard, written by tensorboardX, which Ray Train brings along.

    TensorBoard names a run after its folder, so that the run's name is not needed.
    """

    failure = ""

    def __init__(self, folder: Path, run_name: str, settings: dict[str, Any]):
        """Raises UserError: the package is missing."""
        self._writer_class = import_tracker("tensorboard").SummaryWriter
        self._target, self._settings = folder / "tensorboard", settings
        # An object store knows no append: there the files follow when the training is complete, or with each part of a run.
        self._folder = Path(tempfile.mkdtemp()) / "tensorboard" if is_remote(folder) else self._target
        if self._folder != self._target and is_complete(self._target):
            copy_folder(self._target, self._folder)
        self._writer: Any = None

    def log(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of optimiser step `step`, counted from 1."""
        if self._writer is None:
            self._writer = self._open(step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def add(self, step: int, figures: Metrics) -> bool:
        """As `_Run.add`."""
        self._writer = self._writer or self._open(None)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        return self._flushed()

    def link(self, places: dict[str, str]) -> bool:
        """As `_Run.link`."""
        self._writer = self._writer or self._open(None)
        self._writer.add_text("links", "\n".join(f"- {name}: {uri}" for name, uri in places.items()))
        return self._flushed()

    def close(self, *, failed: bool = False) -> None:
        """Call at the end; failed: of a run that did not come to it."""
        if self._writer is not None:
            self._writer.close()
            self._carry()

    @property
    def run(self) -> str:
        """The run's first file; another one once somebody removed it. "" before the first figure."""
        return min((file.name for file in self._folder.glob(EVENT_FILES)), default="")

    def _flushed(self) -> bool:
        self._writer.flush()
        self._carry()
        return True

    def _carry(self) -> None:
        if self._folder != self._target:
            copy_folder(self._folder, self._target)

    def _open(self, first_step: int | None) -> Any:
        """A writer whose event file makes TensorBoard drop what earlier files hold from `first_step` on; None: nothing."""
        files = len(list(self._folder.glob(EVENT_FILES)))
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
    """A tracker's run: the same after a restart, with every step once. After its first failure nothing more is sent.

    failure: why; "" while it works.
    """

    name: ClassVar[str]

    def __init__(self, folder: Path):
        self._run_file = _RunFile(folder / f"{self.name}.json")
        self.failure = ""

    def log(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of optimiser step `step`, counted from 1."""
        if step > self._run_file.step and self._attempt(
            lambda: self._send(step, metrics), f"from step {step} on"
        ):
            self._run_file.note(step)

    def add(self, step: int, figures: Metrics) -> bool:
        """Take figures of a part of a run; parts may share a step. Whether they were taken: who calls sends nothing twice."""
        return self._attempt(lambda: self._send_part(step, figures), "any more")

    def link(self, places: dict[str, str]) -> bool:
        """Take addresses (URIs) of files and folders, by name. Nothing is uploaded. Whether they were taken."""
        return self._attempt(lambda: self._send_links(places), "any more")

    def close(self, *, failed: bool = False) -> None:
        """Call at the end; failed: of a run that did not come to it."""
        self._attempt(lambda: self._end(failed), "at the end")

    @property
    def run(self) -> str:
        """The tracker's id of the run."""
        return self._run_file.run_id

    def _attempt(self, call: Callable[[], None], when: str) -> bool:
        if not self.failure:
            try:
                call()
            # errors of the tracker, its network or its database: none of them may end the training
            except Exception as error:
                self.failure = f"tracker {self.name}: {_reason(error)}; nothing is sent {when}"
                logger.warning(self.failure)
        return not self.failure

    def _send(self, step: int, metrics: Metrics) -> None:
        raise NotImplementedError

    def _send_part(self, step: int, figures: Metrics) -> None:
        self._send(step, figures)

    def _send_links(self, places: dict[str, str]) -> None:
        raise NotImplementedError

    def _end(self, failed: bool) -> None:
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
        for first in range(0, len(params), MLFLOW_PARAMS):
            self._client.log_batch(run_id, params=params[first : first + MLFLOW_PARAMS])
        return run_id

    def _send(self, step: int, metrics: Metrics) -> None:
        now = int(time.time() * 1000)
        entity = self._mlflow.entities.Metric
        entities = [entity(name, float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_file.run_id, metrics=entities)

    def _send_links(self, places: dict[str, str]) -> None:
        for name, uri in places.items():
            self._client.set_tag(self._run_file.run_id, name, uri)

    def _end(self, failed: bool) -> None:
        self._client.set_terminated(self._run_file.run_id, "FAILED" if failed else "FINISHED")


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

    def _send_part(self, step: int, figures: Metrics) -> None:
        # A row of W&B belongs to one step, which only grows: parts of a round are rows of their own, with its number in them.
        own = max(self._run.step, self._run_file.step + 1)
        self._run.define_metric("*", step_metric="turn")
        self._run.log({**figures, "turn": step}, step=own, commit=True)
        self._run_file.note(own)

    def _send_links(self, places: dict[str, str]) -> None:
        files = self._wandb.Artifact(f"{self._run.id}-files", type="run-files")
        for name, uri in places.items():
            files.add_reference(uri, name=name, checksum=False)
        self._run.log_artifact(files)

    def _end(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
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


def _reason(error: Exception) -> str:
    """An error's first line, without the user names and passwords in its addresses."""
    return re.sub(r"//[^/@\s]*@", "//", first_line(error))[:200]
