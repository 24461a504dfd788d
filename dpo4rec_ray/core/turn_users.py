"""Which users a turn samples: another part of the training users in each, and the same few validation users to watch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo4rec_ray.core.keys import random_places


@dataclass(frozen=True)
class TurnUsers:
    """
    Attributes:
        seed: of the draw. A user's part depends on the user's id and it alone.
        share: of all users, in (0, 1], that take part in a round.
        turn: place of the turn in its round, from 0.
        num_turns: of a round.
        watched: share of the validation users that every turn samples; the first samples all.
    """

    seed: int
    share: float = 1.0
    turn: int = 0
    num_turns: int = 1
    watched: float = 1.0

    @property
    def train_share(self) -> float:
        """Of all training users, about."""
        return self.share / self.num_turns

    @property
    def valid_share(self) -> float:
        """Of all validation users, about."""
        return self.share * (self.watched if self.turn else 1.0)

    def watches(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """[n] ids of validation users -> which of them every turn samples."""
        return random_places(ids, self.seed) / self.share < self.watched

    def __call__(self, ids: npt.NDArray[np.int64], held_out: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """[n] user ids, and which of them are validation users -> which are sampled."""
        place = random_places(ids, self.seed) / self.share
        trained = np.floor(place * self.num_turns) == self.turn
        return (place < 1.0) & np.where(held_out, self.watches(ids) | (self.turn == 0), trained)
