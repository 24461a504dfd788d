"""Whether texts are about their users: reading and style, before and after a round, and which round is kept.

Not in the paper, which reports the reward alone. A text's reward has two parts: what it is worth to anybody (style), and what
it is worth to its user beyond that (reading). Reading is the mean reward of a user's own texts minus that of other users'
texts on the same lists, so how hard the lists are cancels; and every text stands once on each side of the difference of means
(`balanced_others`), so style cancels too. A round's reading gain and style gain are both parts' changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dpo4rec_ray.core.intervals import Interval, bootstrap_columns, paired_bootstrap

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
MIN_OTHERS = 8  # other users whose texts each user is given, at least; where there are so many


def balanced_others(num_users: int, num_samples: int, seed: int) -> tuple[IntArray, IntArray]:
    """Whose texts each user is given, and which of them: users and samples, both [U, M].

    Users stand in a random circle; each is given one text of each of the M next ones. M is the least multiple of
    `num_samples` from MIN_OTHERS on, so every text of every user is given equally often; U - 1 where users are fewer, and
    then only every user is.

    Raises:
        ValueError: fewer than two users, or no sample.
    """
    if num_users < 2 or num_samples < 1:
        raise ValueError(
            f"{num_users} users with {num_samples} texts each: there is no other user's text to compare with"
        )
    num_others = min(num_users - 1, num_samples * -(-MIN_OTHERS // num_samples))
    circle = np.random.default_rng(seed).permutation(num_users)
    steps = np.arange(num_others)
    others = np.empty((num_users, num_others), np.int64)
    others[circle] = circle[(np.arange(num_users)[:, None] + steps + 1) % num_users]
    return others, np.broadcast_to(steps % num_samples, others.shape)


class Change(NamedTuple):
    """A figure of users before and after a round, each with its interval over users."""

    before: Interval
    after: Interval
    change: Interval
    num_users: int

    def as_dict(self) -> dict[str, Any]:
        """Means, and the ends of the intervals under the same name with "_ci95"."""
        found: dict[str, Any] = {}
        for name in ("before", "after", "change"):
            interval: Interval = getattr(self, name)
            found |= {name: interval.mean, f"{name}_ci95": [interval.low, interval.high]}
        return {**found, "users": self.num_users}


def changes(before: Mapping[str, FloatArray], after: Mapping[str, FloatArray]) -> dict[str, Change]:
    """Each figure's mean before, after, and change over users, with 95 % intervals (`core.intervals`).

    before, after: figure -> [U], in the same order of users. A user counts for a figure that is finite on both sides. Figures
    of the same users share their resamples. A figure of no user is left out.
    """
    groups: dict[bytes, list[str]] = {}
    for name in before:
        known = np.isfinite(before[name]) & np.isfinite(after[name])
        if known.any():
            groups.setdefault(known.tobytes(), []).append(name)
    found: dict[str, Change] = {}
    for mask, names in groups.items():
        known = np.frombuffer(mask, dtype=bool)
        sides = [[side[name][known] for name in names] for side in (before, after)]
        columns = np.stack([*sides[0], *sides[1]], axis=1).astype(np.float64)
        columns = np.concatenate([columns, columns[:, len(names) :] - columns[:, : len(names)]], axis=1)
        intervals = bootstrap_columns(columns, np.ones(len(columns)), 2000)
        for place, name in enumerate(names):
            parts = intervals[place :: len(names)]
            found[name] = Change(*parts, num_users=len(columns))
    return {name: found[name] for name in before if name in found}


class Heldout(NamedTuple):
    """One round's figures of the validation users: users [U] ascending, reward and reading [U]."""

    users: IntArray
    reward: FloatArray
    reading: FloatArray


class Verdict(NamedTuple):
    """Whether a round is kept in place of the best one before it, and the changes that decide it."""

    kept: bool
    reward: Interval
    reading: Interval


def judge(candidate: Heldout, best: Heldout) -> Verdict:
    """A round is better than the best one so far if its reward is higher and its reading is not clearly lower.

    Clearly: the whole 95 % interval of the change is below 0. A reward that rises while reading falls is a manner that pleases
    the reranker, and says less about the users than before. Compared over the users that both have.

    Raises:
        ValueError: they have no user in common.
    """
    users, new, old = np.intersect1d(candidate.users, best.users, assume_unique=True, return_indices=True)
    reward = paired_bootstrap(candidate.reward[new] - best.reward[old], users)
    reading = paired_bootstrap(candidate.reading[new] - best.reading[old], users)
    return Verdict(reward.mean > 0 and not reading.high < 0, reward, reading)


def peaked(round_id: int, best: int, patience: int) -> bool:
    """Whether none of the last `patience` rounds was kept: `best` is the best of the rounds up to `round_id`, 0 the base LLM."""
    return round_id - best >= patience
