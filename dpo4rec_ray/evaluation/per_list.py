"""The artifact per_list as arrays: every fit's metrics on the same lists, and paired differences of two systems."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from dpo4rec_ray.core.intervals import Interval, bootstrap_columns
from dpo4rec_ray.evaluation.systems import METRIC_NAMES, NO_BACKBONE, System, table_order

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]
Fit = tuple[str, str, int]  # backbone, system, seed


@dataclass(frozen=True)
class PerList:
    """Every fit's metrics on the same lists, sorted by user and then by list id.

    list_ids, users: [n]; values: [n, metrics] per fit, in the order of `names`.
    """

    list_ids: Array
    users: Array
    names: tuple[str, ...]
    values: dict[Fit, Array]

    @classmethod
    def of(cls, per_list: pd.DataFrame, names: tuple[str, ...] = METRIC_NAMES) -> PerList:
        """From the rows of the artifact, in any order.

        Raises:
            ValueError: no rows, a list twice in one fit, or fits measured on different lists.
        """
        if per_list.empty:
            raise ValueError("per_list has no rows: nothing was evaluated")
        list_ids, users = per_list["list_id"].to_numpy(), per_list["user_id"].to_numpy()
        columns = [per_list[name].to_numpy() for name in names]
        first: tuple[Array, Array] | None = None
        values: dict[Fit, Array] = {}
        fits: dict[Any, Array] = per_list.groupby(["backbone", "system", "seed"]).indices
        for key, rows in fits.items():
            rows = rows[np.lexsort((list_ids[rows], users[rows]))]
            if first is None:
                first = list_ids[rows], users[rows]
                if len(np.unique(first[0])) < len(rows):
                    raise ValueError(f"{key} has rows of one list twice")
            elif not (np.array_equal(first[0], list_ids[rows]) and np.array_equal(first[1], users[rows])):
                raise ValueError(f"{key} was not measured on the lists of the other fits; evaluate again")
            backbone, system, seed = key
            values[backbone, system, int(seed)] = np.stack([column[rows] for column in columns], axis=1)
        assert first is not None
        return cls(*first, names, values)

    @property
    def systems(self) -> dict[System, list[int]]:
        """(backbone, system) -> its seeds, in the order of the tables."""
        found: defaultdict[System, list[int]] = defaultdict(list)
        for backbone, system, seed in sorted(self.values, key=lambda fit: (table_order(*fit[:2]), fit[2])):
            found[backbone, system].append(seed)
        return dict(found)

    @property
    def starts(self) -> Array:
        """Where each user's lists begin, [G]."""
        return np.flatnonzero(np.r_[True, self.users[1:] != self.users[:-1]])

    @property
    def sizes(self) -> FloatArray:
        """Lists of each user, [G]."""
        return np.diff(np.r_[self.starts, len(self.users)]).astype(np.float64)

    def user_sums(self, fit: Fit) -> FloatArray:
        """Each metric summed over each user's lists, [G, metrics]."""
        return np.add.reduceat(self.values[fit].astype(np.float64), self.starts, axis=0)

    def only(self, wanted: npt.NDArray[np.bool_]) -> PerList:
        """The lists where `wanted` [n] holds."""
        values = {fit: rows[wanted] for fit, rows in self.values.items()}
        return replace(self, list_ids=self.list_ids[wanted], users=self.users[wanted], values=values)

    def difference(self, mine: System, theirs: System) -> tuple[FloatArray, FloatArray]:
        """One system minus another on their common seeds: the mean over seeds, summed per user [G, m]; each seed's mean [S, m].

        A system without a backbone has one seed, which is compared with every seed. No common seed gives S = 0.
        """
        systems = self.systems
        seeds = [seed for seed in systems[mine] if theirs[0] == NO_BACKBONE or seed in systems[theirs]]
        total = np.zeros((len(self.starts), len(self.names)))
        means = np.empty((len(seeds), len(self.names)))
        for row, seed in enumerate(seeds):
            other = systems[theirs][0] if theirs[0] == NO_BACKBONE else seed
            delta = self.user_sums((*mine, seed)) - self.user_sums((*theirs, other))
            total += delta / len(seeds)
            means[row] = delta.sum(axis=0) / len(self.users)
        return total, means

    def differences(
        self, pairs: Iterable[tuple[System, System]]
    ) -> dict[tuple[System, System], tuple[FloatArray, FloatArray]]:
        """`difference` of every pair that has a common seed."""
        found = {pair: self.difference(*pair) for pair in pairs}
        return {pair: both for pair, both in found.items() if len(both[1])}

    def intervals(
        self, totals: list[FloatArray], num_resamples: int, by_user: bool = False
    ) -> list[list[Interval]]:
        """Intervals of each difference's metrics: user sums [G, m] per difference -> m intervals per difference.

        Every difference and metric is resampled with the same users. by_user: of the mean over users of the mean over a
        user's lists, instead of the mean over lists.

        Raises:
            ValueError: a metric is not finite.
        """
        if not totals:
            return []
        columns, sizes, width = np.concatenate(totals, axis=1), self.sizes, len(self.names)
        if by_user:
            columns, sizes = columns / sizes[:, None], np.ones(len(sizes))
        found = bootstrap_columns(columns, sizes, num_resamples)
        return [found[start:][:width] for start in range(0, len(found), width)]


def interval_stats(found: Interval) -> dict[str, Any]:
    """An interval as "delta", "ci95" and "p_value"; None where a single user gave no interval."""
    known = not np.isnan(found.p_value)
    return {
        "delta": found.mean,
        "ci95": [found.low, found.high] if known else [None, None],
        "p_value": found.p_value if known else None,
    }
