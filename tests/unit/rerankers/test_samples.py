from __future__ import annotations

import numpy as np
import pytest

from dpo4rec_ray.rerankers.samples import SampleScorer, UserLists, _random_halves


class FixedScorer:
    """Stands for a trained reranker: a candidate's score is the sample's value for it, so rewards can be worked by hand."""

    def __init__(self, sign: float = 1.0):
        self.sign = sign
        self.calls: list[tuple[np.ndarray, np.ndarray]] = []

    def score(
        self, item_ids: np.ndarray, mask: np.ndarray, user_vectors: np.ndarray, user_rows: np.ndarray
    ) -> np.ndarray:
        self.calls.append((item_ids, user_rows))
        return np.where(
            mask, self.sign * np.take_along_axis(user_vectors[user_rows], item_ids, axis=1), -np.inf
        )


def lists() -> UserLists:
    """User 2 has two lists, user 5 one, user 7 none with a positive; rows come unsorted."""
    return UserLists.from_columns(
        np.array([5, 2, 7, 2]),
        [[0, 1, 2], [3, 4, 5], [0, 1, 2], [1, 3, 5]],
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]],
    )


def test_lists_without_a_positive_are_left_out_and_the_rest_sorted() -> None:
    found = lists()
    assert found.user_ids.tolist() == [2, 2, 5]
    assert found.item_ids[2].tolist() == [0, 1, 2]


def test_rewards_by_hand() -> None:
    """NDCG@5 of one relevant item of three is 1, .6309 or .5 by its place.

    Sample A ranks items 5, 4, 3, 2, 1, 0 from the top. User 2: list (3, 4*, 5): place 2 -> .6309; list (1, 3, 5*): 1.
    Mean .8155. User 5: list (0*, 1, 2): place 3 -> .5. Sample B ranks the other way round: list (3, 4*, 5): .6309,
    list (1, 3, 5*): .5; user 5: 1.
    """
    scorer = SampleScorer(
        [FixedScorer()], lists(), np.zeros(8, int), num_items=6, reward="ndcg@5", num_redraws=0, seed=0
    )
    up, down = np.arange(6.0), -np.arange(6.0)
    found = scorer.rewards(np.array([2, 2, 5, 5, 7]), np.stack([up, down, up, down, up]))
    second = 1 / np.log2(3)
    np.testing.assert_allclose(found.reward[:4], [(second + 1) / 2, (second + 0.5) / 2, 0.5, 1.0])
    assert np.isnan(found.reward[4])
    assert found.num_lists.tolist() == [2, 2, 1, 1, 0]
    # user 2 has one list in each half, so the halves are the two lists' own rewards
    assert sorted([found.half_a[0], found.half_b[0]]) == pytest.approx(sorted([second, 1.0]))
    assert np.isnan(found.half_b[2]) or np.isnan(found.half_a[2])


def test_each_fold_scores_only_its_own_users() -> None:
    """User 5 is in fold 1, whose reranker has the other sign."""
    scorers = [FixedScorer(1.0), FixedScorer(-1.0)]
    folds = np.array([0, 0, 0, 0, 0, 1, 0, 0])
    scorer = SampleScorer(scorers, lists(), folds, num_items=6, reward="ndcg@5", num_redraws=0, seed=0)
    found = scorer.rewards(np.array([2, 5]), np.stack([np.arange(6.0)] * 2))
    assert found.reward[1] == 1.0
    assert len(scorers[0].calls) == len(scorers[1].calls) == 1


def test_redraws_keep_positives_and_are_the_same_for_every_call() -> None:
    fixed = FixedScorer()
    scorer = SampleScorer(
        [fixed], lists(), np.zeros(8, int), num_items=6, reward="log_likelihood", num_redraws=4, seed=3
    )
    vectors = np.stack([np.arange(6.0)])
    first = scorer.rewards(np.array([5]), vectors)
    second = scorer.rewards(np.array([5]), vectors)
    assert first.reward[0] == second.reward[0]
    item_ids, _ = fixed.calls[0]
    assert item_ids.shape == (4, 3)
    assert (item_ids == 0).any(axis=1).all(), "the positive item 0 stays in every redraw"


def test_halves_split_every_users_lists_evenly() -> None:
    users = np.repeat(np.arange(50), 7)
    half = _random_halves(users, np.random.default_rng(0))
    sizes = np.bincount(users[half], minlength=50)
    assert set(sizes.tolist()) == {4}
