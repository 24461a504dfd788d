"""The packages of the experiment trackers: whether they are installed, and importing them without reports to their makers."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

from dpo4rec_ray.errors import UserError

# Switches off what the packages report to their makers, and W&B's question for a key, which a run would wait for.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
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
            f"run.trackers: {tracker} needs the package {module}, which is not installed; "
            f'pip install {module}, or pip install "dpo4rec-ray[tracking]" for all trackers'
        )
