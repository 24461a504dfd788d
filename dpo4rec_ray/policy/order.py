"""Which rows each optimiser step sees, in which micro-batch and on which worker.

The rows of a step depend on the seed and on the size of the effective batch alone, so that 1 worker x 8 micro-batches,
8 rows at once, or 2 workers x 4 take the same steps; so does a run that continues on fewer workers, or from the middle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# Length-sorted batches are cut from windows of this many steps: lengths are alike within a step, and which rows
# meet still changes from epoch to epoch.
WINDOW_STEPS = 16


@dataclass(frozen=True)
class Step:
    """One optimiser step: `rows` of all workers; `shares` are this worker's micro-batches, empty ones included."""

    index: int  # from 0 over the whole training
    epoch: int
    rows: list[int]
    shares: list[list[int]]


@dataclass(frozen=True)
class Order:
    """The order of `num_rows` rows over `epochs`.

    effective: rows per optimiser step over all workers; the last step of an epoch takes what is left.
    lengths: tokens per row, to sort by; None keeps the drawn order.
    """

    num_rows: int
    effective: int
    epochs: int
    seed: int
    lengths: Sequence[int] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.effective)

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def micro_batches(self, batch_size: int, world: int) -> int:
        """Micro-batches per worker and step, when a micro-batch holds `batch_size` rows of each worker."""
        return math.ceil(min(self.effective, self.num_rows) / (batch_size * world))

    def steps(self, batch_size: int, rank: int, world: int, start: int = 0) -> Iterator[Step]:
        """The steps from number `start` on, with the share of worker `rank` of `world`."""
        micro = self.micro_batches(batch_size, world)
        for epoch in range(start // self.steps_per_epoch, self.epochs):
            for place, rows in enumerate(self._epoch(epoch)):
                index = epoch * self.steps_per_epoch + place
                if index < start:
                    continue
                firsts = ((m * world + rank) * batch_size for m in range(micro))
                yield Step(index, epoch, rows, [rows[first : first + batch_size] for first in firsts])

    def _epoch(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.num_rows)
        if self.lengths is None:
            return self._cut(order)
        lengths = np.asarray(self.lengths)
        window = WINDOW_STEPS * self.effective
        steps: list[list[int]] = []
        for first in range(0, len(order), window):
            own = order[first : first + window]
            cut = self._cut(own[np.argsort(-lengths[own], kind="stable")])
            # the short step of the last window stays last, or a step number would mean another amount of rows
            full = [step for step in cut if len(step) == self.effective]
            steps += [full[i] for i in rng.permutation(len(full))]
            steps += [step for step in cut if len(step) < self.effective]
        return steps

    def _cut(self, order: np.ndarray) -> list[list[int]]:
        return [order[i : i + self.effective].tolist() for i in range(0, len(order), self.effective)]
