"""Lists that are filled a few at a time, so that memory does not grow with the lists of a partition."""

from __future__ import annotations

import numpy as np
import pytest

from dpo4rec_ray.core import candidates
from dpo4rec_ray.core.candidates import Events, fill_lists, knowledge_cut, plan_lists
from dpo4rec_ray.core.keys import mix, stream


@pytest.mark.parametrize("avoid_seen", [False, True])
def test_lists_are_the_same_however_many_are_filled_at_a_time(
    monkeypatch: pytest.MonkeyPatch, avoid_seen: bool
) -> None:
    rng = np.random.default_rng(0)
    bounds = np.arange(31) * 20
    items = np.concatenate([rng.permutation(90)[:20] for _ in range(30)])
    ratings = rng.integers(1, 6, bounds[-1]).astype(np.float32)
    events = Events(bounds, items, ratings, np.zeros(bounds[-1], np.int64))
    plan = plan_lists(bounds, knowledge_cut(np.diff(bounds), 8), 4)
    keys = stream(mix(plan.user.astype(np.uint64)), plan.number)
    at_once: list[int] = []
    draw = candidates._draw_distinct  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(
        candidates, "_draw_distinct", lambda ids, *rest: at_once.append(len(ids)) or draw(ids, *rest)
    )

    def fill() -> tuple[np.ndarray, np.ndarray]:
        return fill_lists(
            events, plan, keys, num_items=90, num_candidates=40, positive_rating=4, avoid_seen=avoid_seen
        )

    whole = fill()
    monkeypatch.setattr(candidates, "PLACES_AT_ONCE", 40 * 7)
    parts = fill()
    assert at_once[0] == 90 and at_once[1:] == [7] * 12 + [6]
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)
