"""Rejection sampling: which of a user's scored texts the LLM is trained to write (RAFT, arXiv 2304.06767)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from dpo4rec_ray.core.pairing import best_first


@dataclass(frozen=True)
class Chosen:
    """Samples to learn from, best first, and the weight of each in the loss; the weights of a user add up to 1."""

    places: list[int]
    weights: list[float]


def best_of(
    rewards: np.ndarray, texts: Sequence[Hashable], top: int, min_margin: float, temperature: float
) -> Chosen | None:
    """The best `top` distinct texts of a user.

    Args:
        rewards: [N].
        texts: [N]; the same text counts once.
        top: at most so many; never more than half of the distinct texts, or the worst would be taught too.
        min_margin: a text must be better than the user's mean reward by so much, and by more than 0.
        temperature: weights are softmax(reward / temperature) over the chosen texts; 0: all the same.

    Returns:
        None where no text qualifies: a single one, all worth the same, or a reward that is unknown (NaN).
    """
    if not np.isfinite(rewards).all():
        return None
    distinct = best_first(rewards, texts)
    margin = rewards - rewards.mean()
    places = [
        place
        for place in distinct[: min(top, len(distinct) // 2)]
        if margin[place] > 0 and margin[place] >= min_margin
    ]
    if not places:
        return None
    if not temperature:
        return Chosen(places, [1 / len(places)] * len(places))
    scaled = np.exp((rewards[places] - rewards[places].max()) / temperature)
    return Chosen(places, (scaled / scaled.sum()).tolist())
