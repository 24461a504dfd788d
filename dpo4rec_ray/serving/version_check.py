"""Loads a version and checks that it gives the scores that were recorded when it was published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving.loaded_version import RECORDED_TOLERANCE, LoadedVersion, RankTask
from dpo4rec_ray.serving.version_files import RECORDED_FILE, VersionFiles, read_card


def load_version(folder: Path, device: str = "cpu") -> LoadedVersion:
    """The version in memory.

    Raises:
        UserError: it cannot be loaded, or gives other scores than at publishing.
    """
    read_card(folder)
    file = folder / RECORDED_FILE
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
        tasks = [recorded_task(one) for one in recorded]
        expected = [np.array(one["scores"], np.float32) for one in recorded]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: no recorded requests ({error}); publish the run again") from None
    try:
        version = LoadedVersion(VersionFiles(folder), device)
        rankings = version.rank(tasks)
    except UserError as error:
        where = "" if str(folder) in str(error) else f"{folder}: "
        raise UserError(f"{where}{error}; the version is refused") from None
    except Exception as error:  # a damaged file may raise anything; the versions that answer must go on
        raise UserError(
            f"{folder}: cannot be loaded ({type(error).__name__}: {error}); publish the run again"
        ) from error
    for number, (ranking, scores) in enumerate(zip(rankings, expected, strict=True)):
        same_shape = ranking.scores.shape == scores.shape
        if not same_shape or not np.allclose(ranking.scores, scores, atol=RECORDED_TOLERANCE, rtol=0):
            raise UserError(
                f"{file}: request {number} gets other scores now than when the version was published; the version is "
                "refused; publish the run again"
            )
    return version


def recorded_task(one: dict[str, Any]) -> RankTask:
    """A request of recorded.json."""
    return RankTask(
        candidates=one["candidates"],
        user_id=one["user_id"],
        history=[event["item_id"] for event in one["history"]],
        ratings=[event["rating"] for event in one["history"]],
    )
