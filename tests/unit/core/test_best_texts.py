"""Values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpo4rec_ray.core.best_texts import best_of

REWARDS = np.array([0.1, 0.9, 0.5, 0.9, 0.3])
TEXTS = ["a", "b", "c", "b", "d"]  # b twice: four distinct


def test_the_best_distinct_texts_come_first():
    assert best_of(REWARDS, TEXTS, 1, 0.0, 0.0).places == [1]
    # c (.5) lies below the mean (.54): it would teach what is worse than the average text
    assert best_of(REWARDS, TEXTS, 4, 0.0, 0.0).places == [1]
    rewards = np.array([0.1, 0.9, 0.8, 0.2])
    found = best_of(rewards, ["a", "b", "c", "d"], 4, 0.0, 0.0)
    assert (found.places, found.weights) == ([1, 2], [0.5, 0.5])


def test_weights_follow_the_reward():
    found = best_of(np.array([0.0, 1.0, 0.8, 0.1]), list("abcd"), 2, 0.0, 0.2)
    share = 1 / (1 + math.exp(-1))
    np.testing.assert_allclose(found.weights, [share, 1 - share])


def test_a_margin_leaves_users_out():
    assert best_of(REWARDS, TEXTS, 1, 0.3, 0.0).places == [1]
    assert best_of(REWARDS, TEXTS, 1, 0.4, 0.0) is None


@pytest.mark.parametrize(
    ("rewards", "texts"),
    [([1.0], ["a"]), ([1.0, 1.0], ["a", "b"]), ([1.0, 2.0], ["a", "a"]), ([math.nan, 1.0], ["a", "b"])],
)
def test_nothing_to_choose(rewards, texts):
    assert best_of(np.array(rewards), texts, 2, 0.0, 0.0) is None
