"""A training that is continued from a checkpoint, and a user's mistake in a worker, without Ray's processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import train

from dpo4rec_ray.config.training import TrainerSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store.metrics_file import read_metrics
from dpo4rec_ray.train.heldout import HELDOUT, HeldoutEvaluations
from dpo4rec_ray.train.launch import _refusing
from dpo4rec_ray.train.resumable import Observer, run_resumable
from dpo4rec_ray.train.state import read_state, update_state

SECTION = TrainerSection(checkpoint_every=2)
NUM_STEPS = 6


class Killed(Exception):
    """The worker died."""


class Steps:
    """Stands for the trainer: its steps compute nothing."""

    def __init__(self, die_in: int = 0):
        self.step, self._die_in = 0, die_in

    def load(self, folder: Path) -> None:
        self.step = int((folder / "step").read_text())

    def save(self, folder: Path) -> None:
        (folder / "step").write_text(str(self.step))

    def run(self, on_step: Any, *, expect_first: Any = None) -> None:
        for step in range(self.step + 1, NUM_STEPS + 1):
            if step == self._die_in:
                raise Killed
            self.step = step
            if on_step(step, NUM_STEPS, {"loss": 1 / step}):
                return


class Evaluating(Observer):
    """Evaluates after every step; the loss on the held-out pairs is the one of the table."""

    def __init__(self, losses: list[float], patience: int = 0):
        self._losses, self._patience = losses, patience
        self.evaluations = HeldoutEvaluations()

    def restore(self, line: dict[str, Any]) -> None:
        self.evaluations.add(line["step"], line[HELDOUT])

    def after_step(self, step: int, num_steps: int, metrics: dict[str, float]) -> tuple[dict[str, Any], bool]:
        heldout = {"loss": self._losses[step - 1]}
        self.evaluations.add(step, heldout)
        return {HELDOUT: heldout}, self.evaluations.stopped(self._patience)


class Workers:
    """Stands for Ray Train: which worker this is, and the last checkpoint."""

    def __init__(self, folder: Path):
        self.folder, self.rank, self.world = folder, 0, 1
        self.saved: str | None = None

    def report(self, metrics: dict[str, Any], checkpoint: Any) -> None:
        with checkpoint.as_directory() as place:
            self.saved = (Path(place) / "step").read_text()

    def checkpoint(self) -> Any:
        if self.saved is None:
            return None

        @contextlib.contextmanager
        def directory() -> Iterator[str]:
            place = self.folder / "checkpoint"
            place.mkdir(exist_ok=True)
            (place / "step").write_text(self.saved or "")
            yield str(place)

        return SimpleNamespace(as_directory=directory)


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workers:
    found = Workers(tmp_path)
    context = SimpleNamespace(get_world_rank=lambda: found.rank, get_world_size=lambda: found.world)
    monkeypatch.setattr(train, "get_context", lambda: context)
    monkeypatch.setattr(train, "get_checkpoint", found.checkpoint)
    monkeypatch.setattr(train, "report", found.report)
    return found


def run(folder: Path, observer: Observer, die_in: int = 0) -> None:
    run_resumable(Steps(die_in), SECTION, folder, "run", observer)  # type: ignore[arg-type]


def test_what_lies_beyond_the_checkpoint_is_done_again(tmp_path: Path, workers: Workers) -> None:
    update_state(tmp_path, fingerprint="fingerprint", result={"of": "an earlier attempt"})
    with pytest.raises(Killed):
        run(tmp_path, Evaluating([0.7, 0.6, 0.1, 0.1]), die_in=4)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    again = Evaluating([9.0, 9.0, 0.8, 0.5, 0.9, 0.9])  # steps 1 and 2 are not evaluated again
    run(tmp_path, again)
    assert again.evaluations.losses == {1: 0.7, 2: 0.6, 3: 0.8, 4: 0.5, 5: 0.9, 6: 0.9}
    assert again.evaluations.kept == {"loss": 0.5}
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line[HELDOUT]["loss"] for line in lines] == [0.7, 0.6, 0.8, 0.5, 0.9, 0.9]
    state = read_state(tmp_path)
    assert state is not None and state.continued_after == [2] and state.result is None
    assert state.fingerprint == "fingerprint"


def test_every_worker_stops_at_the_same_step_and_rank_0_alone_writes(
    tmp_path: Path, workers: Workers
) -> None:
    losses = [0.7, 0.6, 0.65, 0.61, 0.5, 0.5]
    first = Evaluating(losses, patience=2)
    run(tmp_path, first)
    assert list(first.evaluations.losses) == [1, 2, 3, 4]
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    workers.rank, workers.saved = 1, "2"
    other = Evaluating(losses, patience=2)
    run(tmp_path, other)
    assert other.evaluations.losses == first.evaluations.losses
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines
    state = read_state(tmp_path)
    assert state is not None and state.continued_after == []


@pytest.mark.parametrize("world", [1, 2])
def test_a_users_mistake_is_not_tried_again(tmp_path: Path, workers: Workers, world: int) -> None:
    workers.world = world
    calls: list[Any] = []

    def mistaken(arguments: dict[str, Any]) -> None:
        calls.append(arguments)
        raise UserError("lower lr")

    update_state(tmp_path, continued_after=[3])
    loop = _refusing(mistaken, tmp_path)
    with pytest.raises(UserError) if world > 1 else contextlib.nullcontext():
        loop({})
    loop({})  # as Ray Train would
    assert len(calls) == 1
    state = read_state(tmp_path)
    assert state is not None and (state.refused, state.continued_after) == ("lower lr", [3])
