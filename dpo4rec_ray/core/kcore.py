"""The k-core of users and items, one partition of users at a time.

The k-core is the largest part of the user-item graph in which every user has at least `user_core` and every item at least
`item_core` events. Where repeated events of a user and item are kept, each counts, as in KAR. The core does not depend on
the order of removal. A partition holds whole users, so it counts these without the others; only the counts of items are
sent between processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo4rec_ray.core.keys import Keys


@dataclass(frozen=True)
class ItemCounts:
    """Distinct item keys in ascending order and how many events each has."""

    keys: Keys
    counts: npt.NDArray[np.integer[Any]]


def keep_core_users(
    user: npt.NDArray[Any], alive: npt.NDArray[np.bool_], user_core: int
) -> npt.NDArray[np.bool_]:
    """The events [n] that are left when users with fewer than `user_core` events alive are removed. user: [n], grouped."""
    if user_core <= 1 or not len(user):
        return alive
    _, index = np.unique(user, return_inverse=True)
    counts = np.bincount(index, weights=alive)
    return alive & (counts[index] >= user_core)


def count_items(item_keys: Keys) -> ItemCounts:
    keys, counts = np.unique(item_keys, return_counts=True)
    return ItemCounts(keys, counts.astype(np.int32))


def merge_counts(parts: list[ItemCounts]) -> ItemCounts:
    """Counts of several partitions as one."""
    keys, index = np.unique(np.concatenate([part.keys for part in parts]), return_inverse=True)
    counts = np.bincount(index, weights=np.concatenate([part.counts for part in parts]), minlength=len(keys))
    return ItemCounts(keys, counts.astype(np.int64))


def contains(sorted_keys: Keys, wanted: Keys) -> npt.NDArray[np.bool_]:
    """Which of `wanted` [n] are among the sorted keys."""
    if not len(sorted_keys):
        return np.zeros(len(wanted), dtype=np.bool_)
    return sorted_keys[np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)] == wanted
