from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_ray.core.kcore import contains, count_items, keep_core_users, merge_counts


def slow_core(pairs: set[tuple[int, int]], user_core: int, item_core: int) -> set[tuple[int, int]]:
    """One user or item at a time, until nothing is too small."""
    while True:
        for place, least in ((0, user_core), (1, item_core)):
            for name in {pair[place] for pair in pairs}:
                own = {pair for pair in pairs if pair[place] == name}
                if len(own) < least:
                    pairs = pairs - own
                    break
            else:
                continue
            break
        else:
            return pairs


@given(
    st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=60),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_peeling_partitions_reaches_the_core(
    pairs: set[tuple[int, int]], user_core: int, item_core: int, num_partitions: int
) -> None:
    """Users are counted within their partition, items over all: the fixed point is that of one graph."""
    parts = []
    for number in range(num_partitions):
        own = np.array(
            sorted(pair for pair in pairs if pair[0] % num_partitions == number), np.uint64
        ).reshape(-1, 2)
        parts.append(own[keep_core_users(own[:, 0], np.ones(len(own), bool), user_core)])
    while True:
        items = merge_counts([count_items(part[:, 1]) for part in parts])
        dead = items.keys[items.counts < item_core]
        if not len(dead):
            break
        parts = [part[keep_core_users(part[:, 0], ~contains(dead, part[:, 1]), user_core)] for part in parts]
    found = {(int(user), int(item)) for part in parts for user, item in part}
    assert found == slow_core(set(pairs), user_core, item_core)


def test_counts_add_up_over_partitions() -> None:
    merged = merge_counts(
        [count_items(np.array([5, 3, 5], np.uint64)), count_items(np.array([9, 5], np.uint64))]
    )
    assert merged.keys.tolist() == [3, 5, 9]
    assert merged.counts.tolist() == [1, 3, 1]


def test_contains() -> None:
    keys = np.array([2, 5, 9], np.uint64)
    assert contains(keys, np.array([0, 2, 3, 9, 10], np.uint64)).tolist() == [False, True, False, True, False]
    assert contains(keys[:0], keys).tolist() == [False, False, False]
