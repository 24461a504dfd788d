"""Segments of time and who has a text of each window, by hand."""

from __future__ import annotations

import numpy as np

from dpo4rec_ray.core.time_windows import TimeCuts, refreshed_users


def test_known_windows_are_part_of_training_and_validation_time() -> None:
    times_s = np.array([5, 10, 19, 20, 29, 30, 40])
    assert TimeCuts(10, (20, 30)).segments(times_s).tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert TimeCuts(20, (20, 30), known=1).segments(times_s).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert TimeCuts(10, (20,)).segments(times_s).tolist() == [0, 1, 1, 2, 2, 2, 2]


def test_a_text_is_written_anew_for_who_has_events_before_and_after() -> None:
    """Users: 0 with events in all segments, 1 in training time alone, 2 in the first window alone, 3 in both windows."""
    bounds = np.array([0, 4, 6, 8, 10])
    segment = np.array([0, 1, 2, 3, 0, 0, 2, 2, 2, 3])
    users, windows, before = refreshed_users(bounds, segment)
    assert list(zip(users.tolist(), windows.tolist(), before.tolist(), strict=True)) == [
        (0, 2, 2),  # a training and a validation event come before the first window
        (0, 3, 3),
        (3, 3, 1),  # new in the first window, known in the second
    ]
    # Users keep their order when they are asked about with others, as in another partition.
    users, windows, _ = refreshed_users(np.array([0, 3, 6]), np.array([0, 2, 3] * 2))
    assert list(zip(users.tolist(), windows.tolist(), strict=True)) == [(0, 2), (0, 3), (1, 2), (1, 3)]
    nobody = refreshed_users(np.array([0]), np.zeros(0, np.int64))
    assert [len(column) for column in nobody] == [0, 0, 0]
