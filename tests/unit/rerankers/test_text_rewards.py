from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo4rec_ray.rerankers import text_rewards
from dpo4rec_ray.rerankers.catalogue import Histories
from dpo4rec_ray.rerankers.fit import ListData
from dpo4rec_ray.rerankers.text_rewards import YARDSTICK, SampleScorer, _random_halves, _std_errors
from tests.unit.rerankers.builders import make_lists


class FixedScorer:
    """Replaces a trained reranker: a candidate's score is the sample's value for it, so that rewards can be computed by hand."""

    def __init__(self, sign: float = 1.0):
        self.sign = sign
        self.calls: list[tuple[np.ndarray, np.ndarray]] = []

    def score(
        self,
        item_ids: np.ndarray,
        mask: np.ndarray,
        user_vectors: np.ndarray,
        user_rows: np.ndarray,
        histories: Histories,
    ) -> np.ndarray:
        self.calls.append((item_ids, user_rows))
        assert len(histories.item_ids) == len(item_ids)
        return np.where(
            mask, self.sign * np.take_along_axis(user_vectors[user_rows], item_ids, axis=1), -np.inf
        )


def lists() -> ListData:
    """User 2 has two lists, user 5 has one, user 7 has none with a positive; the rows are unsorted."""
    return make_lists(
        [[0, 1, 2], [3, 4, 5], [0, 1, 2], [1, 3, 5]],
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]],
        [5, 2, 7, 2],
    )


def test_rewards_by_hand() -> None:
    """NDCG@5 of one relevant item of three is 1, .6309 or .5 by its place.

    Sample A ranks items 5, 4, 3, 2, 1, 0 from the top. User 2: list (3, 4*, 5): place 2 -> .6309; list (1, 3, 5*): 1.
    Mean .8155. User 5: list (0*, 1, 2): place 3 -> .5. Sample B ranks the other way round: list (3, 4*, 5): .6309,
    list (1, 3, 5*): .5; user 5: 1.
    """
    scorer = SampleScorer(
        [FixedScorer()], lists(), np.zeros(8, int), num_items=6, metrics=["ndcg@5"], num_redraws=0, seed=0
    )
    up, down = np.arange(6.0), -np.arange(6.0)
    found = scorer.rewards(np.array([2, 2, 5, 5, 7]), np.stack([up, down, up, down, up]))
    second = 1 / np.log2(3)
    np.testing.assert_allclose(found.reward[:4, 0], [(second + 1) / 2, (second + 0.5) / 2, 0.5, 1.0])
    assert np.isnan(found.reward[4, 0])
    assert found.num_lists.tolist() == [2, 2, 1, 1, 0]
    # user 2 has one list in each half, so the halves are the two lists' own rewards
    assert sorted([found.half_a[0, 0], found.half_b[0, 0]]) == pytest.approx(sorted([second, 1.0]))
    assert np.isnan(found.half_b[2, 0]) or np.isnan(found.half_a[2, 0])


def test_each_fold_scores_only_its_own_users() -> None:
    """User 5 is in fold 1, whose reranker has the other sign."""
    scorers = [FixedScorer(1.0), FixedScorer(-1.0)]
    folds = np.array([0, 0, 0, 0, 0, 1, 0, 0])
    scorer = SampleScorer(scorers, lists(), folds, num_items=6, metrics=["ndcg@5"], num_redraws=0, seed=0)
    found = scorer.rewards(np.array([2, 5]), np.stack([np.arange(6.0)] * 2))
    assert found.reward[1, 0] == 1.0
    assert len(scorers[0].calls) == len(scorers[1].calls) == 1


def test_redraws_keep_positives_and_are_the_same_for_every_call() -> None:
    fixed = FixedScorer()
    scorer = SampleScorer(
        [fixed], lists(), np.zeros(8, int), num_items=6, metrics=["log_likelihood"], num_redraws=4, seed=3
    )
    vectors = np.stack([np.arange(6.0)])
    first = scorer.rewards(np.array([5]), vectors)
    second = scorer.rewards(np.array([5]), vectors)
    assert first.reward[0, 0] == second.reward[0, 0]
    item_ids, _ = fixed.calls[0]
    assert item_ids.shape == (5, 3), "four redraws, and the list as drawn"
    assert item_ids[-1].tolist() == [0, 1, 2]
    assert (item_ids == 0).any(axis=1).all(), "the positive item 0 stays in every redraw"


def test_several_metrics_share_one_scoring() -> None:
    """User 2, sample A: reciprocal ranks 1/2 and 1, so MRR .75; the log-likelihoods by the definition."""
    fixed = FixedScorer()
    scorer = SampleScorer(
        [fixed],
        lists(),
        np.zeros(8, int),
        num_items=6,
        metrics=["mrr@5", "log_likelihood"],
        num_redraws=0,
        seed=0,
    )
    found = scorer.rewards(np.array([2]), np.arange(6.0)[None])
    first = 4 - np.log(np.exp([3, 4, 5]).sum())
    second = 5 - np.log(np.exp([1, 3, 5]).sum())
    np.testing.assert_allclose(found.reward[0], [0.75, (first + second) / 2])
    assert len(fixed.calls) == 1


def test_standard_error_is_that_of_a_two_way_layout() -> None:
    """Against the definition, user by user: residuals of value = sample + list, divided by their freedom and the lists."""
    rng = np.random.default_rng(0)
    users, samples = [3, 3, 3, 8, 8, 8], np.arange(6)
    rows_of = {3: [0, 1, 2, 3], 8: [4, 5]}
    sample = np.concatenate(
        [np.full(len(rows_of[user]), number) for number, user in zip(samples, users, strict=True)]
    )
    rows = np.concatenate([rows_of[user] for user in users])
    values = rng.normal(size=len(rows))
    found = _std_errors(values, sample, rows, np.array([0, 0, 0, 1, 1, 1]))
    for user, lists_of_user in rows_of.items():
        mine = np.array(users)[sample] == user
        table = values[mine].reshape(3, len(lists_of_user))
        rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
        freedom = (3 - 1) * (len(lists_of_user) - 1)
        expected = np.sqrt((rest**2).sum() / freedom / len(lists_of_user))
        np.testing.assert_allclose(found[np.array(users) == user], expected)
    one_list = _std_errors(values[:3], np.arange(3), np.zeros(3, int), np.zeros(3, int))
    assert np.isnan(one_list).all()


def test_many_calls_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is split between users only: a user's standard error needs all samples of that user."""
    rng = np.random.default_rng(1)
    users = np.repeat([2, 5], 8)
    vectors = rng.normal(size=(len(users), 6))
    arguments = {"num_items": 6, "metrics": ["log_likelihood"], "num_redraws": 0, "seed": 0}
    whole = SampleScorer([FixedScorer()], lists(), np.zeros(8, int), **arguments).rewards(users, vectors)
    monkeypatch.setattr(text_rewards, "PLACES_PER_CALL", 9)
    fixed = FixedScorer()
    cut = SampleScorer([fixed], lists(), np.zeros(8, int), **arguments).rewards(users, vectors)
    assert len(fixed.calls) == 2
    np.testing.assert_allclose(cut.reward, whole.reward)
    np.testing.assert_allclose(cut.std_error, whole.std_error)


def test_the_yardstick_is_measured_on_the_lists_as_drawn() -> None:
    """User 2, sample A, as computed above: NDCG@5 .8155 on the lists as drawn, with any number of redraws."""
    scorer = SampleScorer(
        [FixedScorer()],
        lists(),
        np.zeros(8, int),
        num_items=6,
        metrics=["ndcg@5", YARDSTICK],
        num_redraws=3,
        seed=1,
    )
    found = scorer.rewards(np.array([2]), np.arange(6.0)[None])
    assert found.reward[0, 1] == pytest.approx((1 / np.log2(3) + 1) / 2)
    assert found.reward[0, 0] != found.reward[0, 1]


def test_histories_stay_with_their_lists() -> None:
    """Every list's history holds its user's id: a sample of user 5 must be scored with the history of user 5, in every copy."""

    class Watching(FixedScorer):
        def score(self, item_ids, mask, user_vectors, user_rows, histories):
            owner = user_vectors[user_rows, 0]
            assert (histories.item_ids[:, 0].numpy() == owner).all()
            return super().score(item_ids, mask, user_vectors, user_rows, histories)

    plain = lists()
    ids = plain.user_ids[:, None]
    told = replace(plain, histories=Histories(ids, torch.ones_like(ids, dtype=torch.bool), ids.float()))
    watching = Watching()
    scorer = SampleScorer(
        [watching], told, np.zeros(8, int), num_items=6, metrics=["mrr@5"], num_redraws=2, seed=0
    )
    users = np.array([5, 5, 2, 2, 2])
    scorer.rewards(users, np.stack([np.full(6, user, float) for user in users]))
    assert len(watching.calls) == 1


def test_halves_split_every_users_lists_evenly() -> None:
    users = np.repeat(np.arange(50), 7)
    half = _random_halves(users, np.random.default_rng(0))
    sizes = np.bincount(users[half], minlength=50)
    assert set(sizes.tolist()) == {4}


def test_rewards_of_others_by_hand() -> None:
    """Sample A ranks items 5..0 from the top, B the other way round; rewards as in `test_rewards_by_hand`.

    User 2's texts are tried on the list of user 5, (0*, 1, 2): A .5, B 1. User 5's on the two lists of user 2: A
    (.6309 + 1) / 2, B (.6309 + .5) / 2. User 7 has no list with a positive, so nobody's text is tried on user 7; its own
    text is tried on users 2 and 5, who count the same although one has two lists.
    """
    scorer = SampleScorer(
        [FixedScorer()], lists(), np.zeros(8, int), num_items=6, metrics=["ndcg@5"], num_redraws=0, seed=0
    )
    up, down = np.arange(6.0), -np.arange(6.0)
    users = np.array([2, 2, 5, 5, 7])
    found = scorer.rewards_of_others(users, np.stack([up, down, up, down, up]), 12, seed=0).reward
    on_two = [(1 / np.log2(3) + 1) / 2, (1 / np.log2(3) + 0.5) / 2]
    np.testing.assert_allclose(found[:, 0], [0.5, 1.0, *on_two, (on_two[0] + 0.5) / 2])


def many_users(num_users: int, num_lists: int) -> ListData:
    """Every candidate of a list of user u is an item u, so a score tells whose list it is."""
    owners = np.repeat(np.arange(num_users), num_lists)
    return make_lists([[user, num_users] for user in owners], [[1.0, 0.0] for _ in owners], owners.tolist())


class Noting(FixedScorer):
    """Notes which users' lists every sample is scored on."""

    def score(self, item_ids, mask, user_vectors, user_rows, histories):
        self.met = {
            row: np.unique(item_ids[user_rows == row, 0]).tolist() for row in np.unique(user_rows).tolist()
        }
        self.num_lists = len(item_ids)
        return super().score(item_ids, mask, user_vectors, user_rows, histories)


def test_others_are_of_the_same_fold_and_split_and_the_same_for_all_samples() -> None:
    """12 users, folds 0 and 1 in turn, the last 4 for validation. User 2's others are among 0, 4, 6; user 8's is 10 alone."""
    folds, splits = np.arange(12) % 2, np.array(["train"] * 8 + ["valid"] * 4)
    watched = Noting()
    scorer = SampleScorer(
        [watched, FixedScorer()],
        many_users(12, 6),
        folds,
        num_items=13,
        metrics=["mrr@5"],
        num_redraws=0,
        seed=0,
        splits=splits,
    )
    vectors = np.random.default_rng(0).normal(size=(4, 13))
    scorer.rewards_of_others(np.array([2, 2, 2, 8]), vectors, 2, seed=5)
    assert watched.met[0] == watched.met[1] == watched.met[2]
    assert len(watched.met[0]) == 2 and set(watched.met[0]) < {0, 4, 6}
    assert watched.met[3] == [10]
    assert watched.num_lists == (3 * 2 + 1) * text_rewards.LISTS_PER_OTHER
    met = [watched.met[0]]
    for seed in range(12):
        scorer.rewards_of_others(np.array([2]), vectors[:1], 2, seed=seed)
        met.append(watched.met[0])
    assert {tuple(one) for one in met} == {(0, 4), (0, 6), (4, 6)}, (
        "every pair of the three is drawn by some seed"
    )
    scorer.rewards_of_others(np.array([2]), vectors[:1], 2, seed=5)
    assert watched.met[0] == met[0], "the others depend on the user and the seed alone"


def test_nobody_else_is_no_worth() -> None:
    scorer = SampleScorer(
        [FixedScorer()],
        many_users(1, 2),
        np.zeros(1, int),
        num_items=2,
        metrics=["mrr@5"],
        num_redraws=0,
        seed=0,
    )
    assert np.isnan(scorer.rewards_of_others(np.array([0]), np.ones((1, 2)), 3, seed=0).reward).all()


def test_rewards_of_others_are_the_same_in_any_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the plain rewards of the other users' own lists, with every redraw and every list; in one call and in many."""
    rng = np.random.default_rng(3)
    users = np.repeat([0, 1, 2], 2)
    vectors = rng.normal(size=(6, 9))
    items = [rng.permutation(9)[:5].tolist() for _ in range(9)]
    data = make_lists(items, [[1.0, 0.0, 1.0, 0.0, 0.0]] * 9, [0, 0, 1, 1, 1, 2, 2, 2, 2])
    scorer = SampleScorer(
        [FixedScorer()],
        data,
        np.zeros(3, int),
        num_items=9,
        metrics=["log_likelihood", YARDSTICK],
        num_redraws=3,
        seed=0,
    )
    expected = np.zeros((6, 2))
    for row, user in enumerate(users):
        others = [other for other in range(3) if other != user]
        found = scorer.rewards(np.array(others), np.stack([vectors[row]] * 2))
        expected[row] = found.reward.mean(axis=0)
    everything = {"num_redraws": 3, "lists_per_other": 9}
    np.testing.assert_allclose(scorer.rewards_of_others(users, vectors, 5, 0, **everything).reward, expected)
    monkeypatch.setattr(text_rewards, "PLACES_PER_CALL", 9)
    np.testing.assert_allclose(scorer.rewards_of_others(users, vectors, 5, 0, **everything).reward, expected)
    one = scorer.rewards_of_others(users, vectors, 5, 0, metrics=[YARDSTICK], lists_per_other=9).reward
    np.testing.assert_allclose(one[:, 0], expected[:, 1], err_msg="the yardstick is on the lists as drawn")


def test_halves_and_errors_of_the_others() -> None:
    """User 0's texts are tried on users 1 and 2, one in each half: the halves are what the text is worth to one of them.

    With two texts and two others the residuals of the two-way layout are all r = (a1 - a2 - b1 + b2) / 4, one degree of freedom
    is left, so the standard error is sqrt(4 r^2 / 1 / 2).
    """
    data = make_lists([[0, 1, 2], [2, 1, 0], [1, 0, 2]], [[1.0, 0.0, 0.0]] * 3, [0, 1, 2])
    scorer = SampleScorer(
        [FixedScorer()], data, np.zeros(3, int), num_items=3, metrics=["mrr@5"], num_redraws=0, seed=0
    )
    vectors = np.array([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    found = scorer.rewards_of_others(np.array([0, 0]), vectors, 2, seed=0)
    # text 0 ranks 0, 1, 2: the positive 2 of user 1 is third, the positive 1 of user 2 second; text 1 ranks 1, 2, 0
    assert {(a[0], b[0]) for a, b in zip(found.half_a, found.half_b, strict=True)} in (
        {(1 / 3, 1 / 2), (1 / 2, 1.0)},
        {(1 / 2, 1 / 3), (1.0, 1 / 2)},
    )
    np.testing.assert_allclose(found.reward[:, 0], [5 / 12, 3 / 4])
    rest = (1 / 3 - 1 / 2 - 1 / 2 + 1) / 4
    np.testing.assert_allclose(found.std_error[:, 0], np.sqrt(2 * rest**2))
    assert found.num_lists.tolist() == [2, 2]
