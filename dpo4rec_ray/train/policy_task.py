"""What a worker that trains the policy needs to know, and what its learner brings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.policy.groups import Group
from dpo4rec_ray.policy.objectives import BatchLayout, Objective, TrainingRow
from dpo4rec_ray.policy.trainer import FirstFigure
from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store.artifacts import Manifest, RunDir


@dataclass(frozen=True)
class PolicyTask:
    """
    Attributes:
        seed: of the order of the rows and of the LoRA's first weights.
        base: the model that training starts from.
        lora: a LoRA on the base that is trained further; None: a new one.
        reference: folder of the reference's stored log-probabilities; None: they are those of the model with its LoRA off, or
            the same as `sampler`'s.
        sampler: folder of the stored log-probabilities of the policy that drew the texts, where that is not the reference.
        moved: that policy, from which training starts, is not the reference.
        temperature: of the distribution whose log-probabilities are computed.
        deepspeed: content of the user's DeepSpeed file.
    """

    config: Config
    store: RunDir
    round_id: int
    seed: int
    base: str
    lora: str | None
    reference: str | None
    sampler: str | None
    moved: bool
    temperature: float
    deepspeed: dict[str, Any]

    @property
    def folder(self) -> Place:
        return self.store.path("policy", self.round_id)

    @property
    def objective(self) -> str:
        """The name of the learner."""
        return self.config.policy.objective_of(self.round_id)


@dataclass(frozen=True)
class Material:
    """What is trained on, and what it is evaluated on.

    Attributes:
        lengths: [n] tokens of each training row.
        heldout: rows of each kind.
        trained: training rows of each kind: how the kinds weigh in the loss that chooses the policy.
        counts: for the manifest.
    """

    training: Sequence[TrainingRow]
    lengths: np.ndarray
    heldout: dict[str, Sequence[TrainingRow]]
    trained: dict[str, int]
    counts: dict[str, int]


class TextSource(Protocol):
    """Which texts the reference reads, part by part, and the table that holds its numbers."""

    # The first is the one that the numbers lie beside.
    artifacts: tuple[str, ...]
    schema: str
    per_token: bool
    unit: str

    def total(self, manifests: Sequence[Manifest]) -> int:
        """Rows of the reference, for the line of progress. manifests: of each artifact."""

    def read(self, files: Sequence[Place]) -> tuple[pa.Array, list[Group]]:
        """Users [n] and groups [n] of one part; files: of each artifact."""

    def table(self, users: pa.Array, logps: list[Any]) -> pa.Table:
        """logps: of the groups, as `ReferenceScorer` returns them."""


class Watcher(Protocol):
    """Sees the metrics of every step; returns new warnings, one line each."""

    def see(self, step: int, metrics: dict[str, float]) -> list[str]: ...


class Learner(Protocol):
    """What the policy learns from a round's scored texts: one file each (train.learners)."""

    # What the reference reads; None: there is no reference.
    texts: TextSource | None
    # What one row is, for lines of progress.
    unit: str
    # The metrics of its steps that the report shows.
    shown: tuple[str, ...]

    def material(self, task: PolicyTask) -> Material:
        """Rows without those that are longer than `Config.max_training_tokens`."""

    def objective(self, layout: BatchLayout, task: PolicyTask) -> Objective:
        """What a step minimises."""

    def stored(self, config: Config, moved: bool) -> tuple[bool, bool]:
        """Whether log-probabilities of the reference, and of the policy that drew the texts, are computed before training.

        moved: that policy is not the reference.
        """

    def temperature(self, config: Config, round_id: int) -> float:
        """Of the distribution that is trained."""

    def watch(self, config: Config, num_steps: int) -> Watcher:
        """What looks for signs of trouble."""

    def first_figure(self, task: PolicyTask) -> FirstFigure | None:
        """What must hold in the first step, where something must."""

    def lines(self, counts: dict[str, int], heldout: dict[str, float]) -> list[str]:
        """For the terminal, after training."""
