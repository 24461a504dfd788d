from __future__ import annotations

from typing import Any

import numpy as np

from dpo4rec_ray.exchange.importing import _joined


def line(pair_id: int, rejected: int, user: int = 7, chosen: int = 2) -> dict[str, Any]:
    """A line of an export: one rejected text."""
    return {
        "user_id": user,
        "pair_id": pair_id,
        "prompt_token_ids": np.array([1]),
        "chosen_token_ids": np.array([chosen]),
        "rejected_token_ids": [np.array([rejected])],
        "rejected_reward": [float(rejected)],
    }


def test_lines_of_one_pair_are_joined_and_those_of_the_next_are_not() -> None:
    """A pair of two rejected texts, then another pair of the same user and the same chosen text, then another user's."""
    found = list(_joined(iter([line(0, 3), line(0, 4), line(1, 5), line(1, 6, user=8)])))
    assert [[one.tolist() for one in pair["rejected_token_ids"]] for pair in found] == [
        [[3], [4]],
        [[5]],
        [[6]],
    ]
    assert [pair["rejected_reward"] for pair in found] == [[3.0, 4.0], [5.0], [6.0]]
