"""Pairing: the N rewards of a user's samples -> pairs of a chosen and a rejected sample, or why there are none.

Departs from the paper, which pairs the best with the worst of every user. A tie, a spread below `min_margin`, one that luck
explains, or two equal texts teach DPO nothing, so such users are dropped and counted by reason. A user may give several pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Rewards = npt.NDArray[Any]
Completions = Sequence[Sequence[int]]


class Kind(StrEnum):
    """Whose texts a pair compares: two of the user's own, or the user's best with the best of another user."""

    OWN = "own"
    OTHER = "other"


class Drop(StrEnum):
    """Why a user gives no pair, or no more pairs."""

    TIE = "tie"
    MARGIN = "below_min_margin"
    LUCK = "below_min_std_errors"
    FEW = "fewer_than_two_samples"
    NO_LISTS = "no_training_list"
    NO_OTHERS = "nobody_to_compare_with"  # for the personal reward
    SAME = "identical_completions"
    USED = "texts_used_up"


@dataclass(frozen=True)
class Limits:
    """What a rule keeps to. The margins are differences of rewards, in their unit."""

    max_pairs: int = 1
    min_margin: float = 0.0
    min_reliable: float = 0.0  # for this user: what luck alone makes less often
    seed: int = 0  # of this user's draws; for rules that draw


@dataclass(frozen=True)
class Made:
    """Pairs of (chosen, rejected) as indices into the samples, the clearest first, and why there are no more of them."""

    pairs: list[tuple[int, int]]
    short: Drop | None = None  # None: as many as were asked for


def best_vs_worst(rewards: Rewards, completions: Completions, limits: Limits) -> Made:
    """The sample with the highest reward is chosen, the one with the lowest rejected; first of equals. One pair, at most.

    rewards: [N], NaN when the user has no training list to score on; completions: the N samples' token ids. The reasons are
    tried in this order: fewer than two samples; any reward NaN; all completions identical; all rewards equal; spread below
    a limit; chosen and rejected completions identical.

    Raises:
        ValueError: the numbers of rewards and completions differ.
    """
    nothing = _no_choice(rewards, completions)
    if nothing:
        return Made([], nothing)
    chosen, rejected = int(rewards.argmax()), int(rewards.argmin())
    too_close = _too_close(rewards, chosen, rejected, limits)
    if too_close:
        return Made([], too_close)
    if tuple(completions[chosen]) == tuple(completions[rejected]):
        return Made([], Drop.SAME)
    return Made([(chosen, rejected)])


def top_vs_bottom(rewards: Rewards, completions: Completions, limits: Limits) -> Made:
    """The i-th best text is chosen and the i-th worst rejected, i = 1 .. max_pairs; each text is in one pair at most.

    Arguments and reasons as `best_vs_worst`. Equal texts count once. The margins shrink from pair to pair, so the first pair
    that is too close ends the series.

    Raises:
        ValueError: the numbers of rewards and completions differ.
    """
    nothing = _no_choice(rewards, completions)
    if nothing:
        return Made([], nothing)
    distinct = best_first(rewards, [tuple(one) for one in completions])
    most = min(limits.max_pairs, len(distinct) // 2)
    pairs: list[tuple[int, int]] = []
    for chosen, rejected in zip(distinct[:most], distinct[::-1], strict=False):
        too_close = _too_close(rewards, chosen, rejected, limits)
        if too_close:
            return Made(pairs, too_close)
        pairs.append((chosen, rejected))
    return Made(pairs, None if len(pairs) == limits.max_pairs else Drop.USED)


def worst_vs_best(rewards: Rewards, completions: Completions, limits: Limits) -> Made:
    """The pairs of `top_vs_bottom` the wrong way round: a control, which has to teach the opposite.

    Arguments, reasons and errors as `top_vs_bottom`.
    """
    made = top_vs_bottom(rewards, completions, limits)
    return Made([(rejected, chosen) for chosen, rejected in made.pairs], made.short)


def random_pairs(rewards: Rewards, completions: Completions, limits: Limits) -> Made:
    """A user's distinct texts in random order, two by two: a control, from which no reward can be learned.

    Users, numbers of pairs, reasons and errors as `top_vs_bottom`, so that both rules train on as much; the draw depends on
    `limits.seed` alone.
    """
    made = top_vs_bottom(rewards, completions, limits)
    distinct = best_first(rewards, [tuple(one) for one in completions]) if made.pairs else []
    drawn = np.random.default_rng(limits.seed).permutation(distinct).tolist()
    return Made(list(zip(drawn[::2], drawn[1::2], strict=False))[: len(made.pairs)], made.short)


def best_first(rewards: Rewards, texts: Sequence[Hashable]) -> list[int]:
    """Places of the distinct texts, best first; of equal ones that with the highest reward."""
    first: dict[Hashable, int] = {}
    for place in np.argsort(-rewards, kind="stable").tolist():
        first.setdefault(texts[place], place)
    return list(first.values())


def worst_samples(
    rewards: Rewards, completions: Completions, pair: tuple[int, int], count: int, limits: Limits
) -> list[int]:
    """Up to `count` rejected samples beside one chosen, worst first (S-DPO, arXiv 2406.09215).

    pair: (chosen, rejected) of a rule. Each of the others lies below the chosen by more than 0 and by the limits, and no text
    comes twice.
    """
    chosen, rejected = pair
    found, seen = [rejected], {tuple(completions[chosen]), tuple(completions[rejected])}
    for place in np.argsort(rewards, kind="stable").tolist():
        text = tuple(completions[place])
        if len(found) >= count or _too_close(rewards, chosen, place, limits):
            break
        if text not in seen:
            found.append(place)
            seen.add(text)
    return found


def _no_choice(rewards: Rewards, completions: Completions) -> Drop | None:
    """Why these samples cannot be told apart at all."""
    if rewards.shape != (len(completions),):
        raise ValueError(f"rewards of shape {rewards.shape} do not match {len(completions)} completions")
    if len(completions) < 2:
        return Drop.FEW
    if np.isnan(rewards).any():
        return Drop.NO_LISTS
    # Checked before the tie that it causes: a policy that writes one text only is another fault than a reward that always ties.
    if len({tuple(completion) for completion in completions}) == 1:
        return Drop.SAME
    return None


def _too_close(rewards: Rewards, chosen: int, rejected: int, limits: Limits) -> Drop | None:
    margin = float(rewards[chosen]) - float(rewards[rejected])
    if margin <= 0:
        return Drop.TIE
    if margin < limits.min_margin:
        return Drop.MARGIN
    return Drop.LUCK if margin < limits.min_reliable else None


Pairing = Callable[[Rewards, Completions, Limits], Made]
PAIRINGS: dict[str, Pairing] = {
    "best_vs_worst": best_vs_worst,
    "top_vs_bottom": top_vs_bottom,
    "random": random_pairs,
    "worst_vs_best": worst_vs_best,
}
CONTROLS = ("random", "worst_vs_best")  # whose pairs do not follow the reward
