"""Which rows each optimiser step sees, in which micro-batch and on which worker.

The rows of a step depend only on the seed and the global batch size. So 1 worker x 8 micro-batches, 1 micro-batch of 8 rows,
and 2 workers x 4 take the same steps; so does a run that continues with fewer workers, or from the middle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# Sorting by length happens within windows of this many steps: lengths are similar within a step, and which rows
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
class StepOrder:
    """The order of `num_rows` rows over `epochs`.

    global_batch_size: rows per optimiser step over all workers; the last step of an epoch takes what is left.
    lengths: tokens per row, to sort by; None keeps the drawn order.
    """

    num_rows: int
    global_batch_size: int
    epochs: int
    seed: int
    lengths: Sequence[int] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.global_batch_size)

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def micro_batches(self, batch_size: int, world: int) -> int:
        """Micro-batches per worker and step, when a micro-batch holds `batch_size` rows of each worker."""
        return math.ceil(min(self.global_batch_size, self.num_rows) / (batch_size * world))

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
        window = WINDOW_STEPS * self.global_batch_size
        steps: list[list[int]] = []
        for first in range(0, len(order), window):
            own = order[first : first + window]
            cut = self._cut(own[np.argsort(-lengths[own], kind="stable")])
            # the short step of the last window stays last, so that a step's number tells how many rows came before it
            full = [step for step in cut if len(step) == self.global_batch_size]
            steps += [full[i] for i in rng.permutation(len(full))]
            steps += [step for step in cut if len(step) < self.global_batch_size]
        return steps

    def _cut(self, order: np.ndarray) -> list[list[int]]:
        return [
            order[i : i + self.global_batch_size].tolist()
            for i in range(0, len(order), self.global_batch_size)
        ]
