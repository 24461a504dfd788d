"""Pairing: the N rewards of a user's samples -> the chosen and the rejected sample, or why there is none.

Departs from the paper, which pairs the best with the worst of every user. A tie, a spread below `min_margin` or two equal
texts teach DPO nothing, so such users are dropped and counted by reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt


class Drop(StrEnum):
    """Why a user gives no pair."""

    TIE = "tie"
    MARGIN = "below_min_margin"
    FEW = "fewer_than_two_samples"
    NO_LISTS = "no_training_list"
    SAME = "identical_completions"


def best_vs_worst(
    rewards: npt.NDArray[Any], completions: Sequence[Sequence[int]], min_margin: float
) -> tuple[int, int] | Drop:
    """The sample with the highest reward is chosen, the one with the lowest rejected; first of equals.

    rewards: [N], NaN when the user has no training list to score on; completions: the N samples' token ids;
    min_margin: in units of the reward. The reasons are tried in this order: fewer than two samples; any
    reward NaN; all completions identical; all rewards equal; spread < min_margin; chosen and rejected
    completions identical.

    Returns:
        (chosen, rejected) as indices into the samples, or the reason for no pair.

    Raises:
        ValueError: the numbers of rewards and completions differ.
    """
    if rewards.shape != (len(completions),):
        raise ValueError(f"rewards of shape {rewards.shape} do not match {len(completions)} completions")
    if len(completions) < 2:
        return Drop.FEW
    if np.isnan(rewards).any():
        return Drop.NO_LISTS
    texts = [tuple(completion) for completion in completions]
    # Checked before the tie that it causes: a policy that writes one text only is another fault than a reward that always ties.
    if len(set(texts)) == 1:
        return Drop.SAME
    chosen, rejected = int(rewards.argmax()), int(rewards.argmin())
    spread = float(rewards[chosen]) - float(rewards[rejected])
    if spread == 0:
        return Drop.TIE
    if spread < min_margin:
        return Drop.MARGIN
    if texts[chosen] == texts[rejected]:
        return Drop.SAME
    return chosen, rejected


def worst_samples(
    rewards: npt.NDArray[Any],
    completions: Sequence[Sequence[int]],
    pair: tuple[int, int],
    count: int,
    min_margin: float,
) -> list[int]:
    """Up to `count` rejected samples beside one chosen, worst first (S-DPO, arXiv 2406.09215).

    pair: (chosen, rejected) of a rule. Each of the others lies below the chosen by more than 0 and at least `min_margin`, and
    no text comes twice.
    """
    chosen, rejected = pair
    found, seen = [rejected], {tuple(completions[chosen]), tuple(completions[rejected])}
    for place in np.argsort(rewards, kind="stable").tolist():
        gap = float(rewards[chosen]) - float(rewards[place])
        text = tuple(completions[place])
        if len(found) >= count or gap <= 0 or gap < min_margin:
            break
        if text not in seen:
            found.append(place)
            seen.add(text)
    return found


Pairing = Callable[[npt.NDArray[Any], Sequence[Sequence[int]], float], tuple[int, int] | Drop]
PAIRINGS: dict[str, Pairing] = {"best_vs_worst": best_vs_worst}
