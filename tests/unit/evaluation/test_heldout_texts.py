"""Figures of held-out texts: own and other users' rewards with a reranker that can be worked by hand, and the counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpo4rec_ray.evaluation.heldout_texts import HeldoutMeasure, UserTexts, accuracy_stats, change_of
from dpo4rec_ray.rerankers.fit import ListData
from dpo4rec_ray.rerankers.text_rewards import YARDSTICK, SampleScorer
from dpo4rec_ray.store.schemas import HELDOUT_FIGURES
from tests.unit.rerankers.builders import make_lists
from tests.unit.rerankers.test_text_rewards import FixedScorer

TITLES = ["Heat (1995)", "Alien Dawn (1979)", "Fargo (1996)"]
ATTRIBUTES = [["genre: crime"], ["genre: horror"], ["genre: crime", "by: Coen"]]
SECOND = 1 / np.log2(3)


def lists() -> ListData:
    """Users 1 and 2 like items 2 and 0 of (0, 1, 2); user 4 likes nothing."""
    return make_lists([[0, 1, 2]] * 3, [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [1, 2, 4])


def measure() -> HeldoutMeasure:
    scorer = SampleScorer(
        [FixedScorer()],
        lists(),
        np.zeros(5, int),
        num_items=3,
        metrics=["ndcg@5", YARDSTICK],
        num_redraws=0,
        seed=0,
    )
    return HeldoutMeasure(scorer, TITLES, ATTRIBUTES, {1: [0], 2: [1], 4: []}, {1: [2], 2: [0]}, seed=0)


UP, DOWN = [0.0, 1.0, 2.0], [2.0, 1.0, 0.0]  # rank item 2 first, item 0 first
BEFORE = UserTexts(
    np.array([1, 1, 2, 2, 4, 4]),
    [
        "likes crime",
        "likes crime",
        'liked "Alien Dawn" and "Blade"',
        "likes horror",
        "likes crime",
        "likes it",
    ],
    np.array([UP, DOWN, UP, UP, UP, UP], np.float32),
)
AFTER = UserTexts(
    np.array([1, 1, 2, 2]),
    ["likes Coen, crime", "saw Heat (1995)", "likes crime", "likes horror"],
    np.array([UP, UP, DOWN, DOWN], np.float32),
)


def test_figures_by_hand() -> None:
    """UP is worth 1 to user 1 and .5 to user 2, DOWN .5 and 1. User 4 has no reward and is left out of everything.

    Before: user 1's texts are UP and DOWN, user 2's both UP; the only other's first text is given to each. After: each
    user's own texts are worth 1, the other's .5. Later likes: user 1 {crime: 1, Coen: 1}, user 2 {crime: 1}.
    """
    users, found = measure().figures({"before": BEFORE, "after": AFTER})
    assert users.tolist() == [1, 2]
    before, after = found["before"], found["after"]
    assert tuple(before) == tuple(after) == HELDOUT_FIGURES
    assert before["reward"] == pytest.approx([0.75, 0.5]) and after["reward"] == pytest.approx([1.0, 1.0])
    assert before["others_reward"] == pytest.approx([1.0, 0.5])  # UP on user 1's list and on user 2's
    assert after["others_reward"] == pytest.approx([0.5, 0.5])
    np.testing.assert_allclose(before["ndcg"], before["reward"])  # without redraws they are the same
    assert before["fit"] == pytest.approx([1.0, 0.0]) and before["fit_others"] == pytest.approx([1.0, 0.0])
    assert after["fit"] == pytest.approx([1.0, 0.5]) and after["fit_others"] == pytest.approx([0.5, 0.5])
    assert before["values"].tolist() == [1.0, 0.5] and after["values"].tolist() == [1.0, 1.0]
    assert [before[f"titles_{kind}"][1] for kind in ("history", "catalogue", "invented")] == [0.5, 0.0, 0.5]
    assert [after[f"titles_{kind}"][0] for kind in ("history", "catalogue", "invented")] == [0.5, 0.0, 0.0]
    assert before["distinct_texts"].tolist() == [0.5, 1.0]
    assert before["common_opening"].tolist() == [1.0, 0.0]
    assert before["words"].tolist() == [2.0, 3.5]


def test_reading_and_style_gain_by_hand() -> None:
    """Reading before -.25 and 0, after .5 and .5; others' texts 1 and .5, then .5 and .5."""
    _, found = measure().figures({"before": BEFORE, "after": AFTER})
    changes = change_of(found["before"], found["after"])
    reading, style = changes["reading"], changes["others_reward"]
    assert (reading.before.mean, reading.after.mean) == pytest.approx((-0.125, 0.5))
    assert reading.change.mean == pytest.approx(0.625)
    assert style.change.mean == pytest.approx(-0.25)
    assert changes["reward"].change.mean == pytest.approx(reading.change.mean + style.change.mean)
    assert changes["fit_above"].change.mean == pytest.approx(0.25)


def test_nobody_has_a_reward() -> None:
    nobody = BEFORE.of(np.array([4]))
    users, found = measure().figures({"before": nobody, "after": nobody})
    assert len(users) == 0 and len(found["before"]["reward"]) == 0


def test_a_single_user_has_no_others_but_all_counts() -> None:
    users, found = measure().figures({"before": BEFORE.of(np.array([1])), "after": AFTER})
    assert users.tolist() == [1]
    assert np.isnan(found["after"]["others_reward"]).all() and found["after"]["reward"].tolist() == [1.0]
    assert "reading" not in change_of(found["before"], found["after"])


def test_later_likes_and_texts_belong_to_the_user_and_not_to_the_row() -> None:
    texts = UserTexts(np.array([7, 7, 9]), ["a", "b", "c"], torch.arange(3.0)[:, None].numpy())
    assert texts.per_user() == [["a", "b"], ["c"]] and texts.of(np.array([9])).texts == ["c"]
    assert texts.of(np.array([9])).vectors.tolist() == [[2.0]]


def test_accuracy_only_where_the_truth_is_known() -> None:
    assert accuracy_stats(AFTER, {}) == {}
    found = accuracy_stats(AFTER, {1: ["genre: crime", "by: Coen"], 2: ["genre: horror"]})
    assert list(found) == ["all", "by", "genre"]
    # crime of user 1, crime and horror of user 2: two of three are true; of the others' truths hold only crime of user 2
    assert found["genre"]["accuracy"] == pytest.approx(2 / 3) and found["genre"]["chance"] == pytest.approx(
        1 / 3
    )
    assert found["genre"]["corrected"] == pytest.approx(0.5)
