"""Segments of time in a split by time: training time 0, validation time 1, then the windows of test time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]
Refreshed = tuple[IntArray, IntArray, IntArray]  # of `refreshed_users`
FIRST_WINDOW = 2  # the segment in which test time begins


@dataclass(frozen=True)
class TimeCuts:
    """When validation time and each window of test time begin, in seconds since 1970.

    Attributes:
        windows_s: of all windows, those that are known already included; one without data.drift_windows.
        known: how many of them are part of training and validation time.
    """

    valid_s: int
    windows_s: tuple[int, ...]
    known: int = 0

    def segments(self, times_s: IntArray) -> IntArray:
        """The segment of each event: training time 0, validation time 1, then the windows of test time from `known` on."""
        return np.searchsorted(np.array([self.valid_s, *self.windows_s[self.known :]]), times_s, side="right")


def first_segment_sizes(bounds: IntArray, segment: Array) -> IntArray:
    """How many events each user has in the user's first segment (training, validation or test time), [U].

    With a split by time, the length of a knowledge history must not depend on later events. segment: [n], per user in
    ascending order.
    """
    first = segment[np.minimum(bounds[:-1], max(0, len(segment) - 1))] if len(segment) else bounds[:-1]
    user = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    return np.bincount(user, weights=segment == first[user], minlength=len(bounds) - 1).astype(np.int64)


def refreshed_users(bounds: IntArray, segment: Array) -> Refreshed:
    """Whose text can be written anew when a window of test time begins: users with events before it, and in or after it.

    Args:
        segment: [n] as in `plan_lists`; windows are the segments from FIRST_WINDOW on.

    Returns:
        user, window (a segment) and number of events before that window, [P] each, user by user, and each user's windows in
        their order: an order that does not depend on which users are asked about together.
    """
    sizes = np.diff(bounds)
    user = np.repeat(np.arange(len(sizes)), sizes)
    last = int(segment.max()) if len(segment) else -1
    found = [(np.zeros(0, np.int64),) * 3]
    for window in range(FIRST_WINDOW, last + 1):
        before = np.bincount(user, weights=segment < window, minlength=len(sizes)).astype(np.int64)
        chosen = np.flatnonzero((before > 0) & (before < sizes))
        found.append((chosen, np.full(len(chosen), window), before[chosen]))
    users, windows, before = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((windows, users))
    return users[order], windows[order], before[order]
