"""training.json: which training a folder belongs to, how far it got, and where its checkpoints are.

The driver writes the file before the workers start and reads it after they have ended. In between rank 0 writes it, and a
worker that finds a user's mistake. Beside it metrics.jsonl has one line per step (store.metrics_file).
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dpo4rec_ray.config.training import TrainerSection
from dpo4rec_ray.storage.places import Place, place, remove
from dpo4rec_ray.store.artifacts import MANIFEST, RunDir, write_json

STATE = "training.json"


@dataclass(frozen=True)
class TrainingState:
    """
    Attributes:
        id: keeps this training's checkpoints apart from those of others on shared storage.
        fingerprint: of the work; a training of other work is not continued.
        continued_after: the steps from whose checkpoints the training was continued.
        refused: a user's mistake that a worker found; "": none.
        result: what the training came to; None until the policy is saved.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    fingerprint: str = ""
    continued_after: list[int] = field(default_factory=list)
    refused: str = ""
    result: dict[str, Any] | None = None


def read_state(folder: Place) -> TrainingState | None:
    """The state of the training in a folder; None where none was begun."""
    try:
        return TrainingState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def update_state(folder: Place, **changes: Any) -> TrainingState:
    """Write the state with other values of some fields; a new state where there is none."""
    state = replace(read_state(folder) or TrainingState(), **changes)
    write_json(folder / STATE, asdict(state))
    return state


def begin(store: RunDir, name: str, round_id: int = 0) -> Place:
    """The artifact's folder, empty, or as an interrupted training of the same work left it."""
    folder = store.path(name, round_id)
    state = read_state(folder)
    same = state is not None and state.fingerprint == store.fingerprint and not (folder / MANIFEST).exists()
    store.start(name, round_id, keep=same)
    if not same:
        update_state(folder, fingerprint=store.fingerprint)
    return folder


def checkpoint_storage(section: TrainerSection, folder: Place) -> str:
    """Folder or URI of this training's checkpoints; no other training uses it."""
    if not section.storage_path:
        return str(folder / "ray_train")
    path = section.storage_path.rstrip("/")
    if "://" not in path:
        path = str(Path(path).expanduser().resolve())
    return f"{path}/{(read_state(folder) or update_state(folder)).id}"


def remove_checkpoints(section: TrainerSection, folder: Place) -> None:
    """Remove what only an unfinished training needs: checkpoints, and Ray Train's own files beside them."""
    remove(place(checkpoint_storage(section, folder)))
