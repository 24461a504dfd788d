"""The closed-form map from texts to items, against ridge regression in numpy and cases that can be worked out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpo4rec_ray.rerankers.text_regression import (
    ACTIVITY_EXPONENT,
    POPULARITY_EXPONENT,
    POPULARITY_PRIOR,
    text_regression,
)

NUM_ITEMS, DIM, RIDGE = 7, 5, 0.3


def ridge_in_numpy(vectors: np.ndarray, likes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """vectors [U, K, D], likes [U, items] of 0 and 1 -> mean [D], B [D, items], divisors of the items [items].

    Users without a text or a like are left out; every other one weighs one, shared by its texts.
    """
    rows, weights, targets = [], [], []
    used = [u for u in range(len(vectors)) if likes[u].any() and vectors[u].any()]
    for u in used:
        own = [text / np.linalg.norm(text) for text in vectors[u] if text.any()]
        rows += own
        weights += [1 / len(own)] * len(own)
        targets += [likes[u] * likes[u].sum() ** -ACTIVITY_EXPONENT] * len(own)
    x, w, y = np.array(rows), np.array(weights), np.array(targets)
    mean = (x * w[:, None]).sum(axis=0) / len(used)
    x = (x - mean) * np.sqrt(w)[:, None]
    b = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ (y * np.sqrt(w)[:, None]))
    counts = likes[used].sum(axis=0) + POPULARITY_PRIOR
    return mean, b, (counts / counts.mean()) ** POPULARITY_EXPONENT


def fitted(vectors: np.ndarray, likes: np.ndarray, rank: int = DIM, ridge: float = RIDGE):
    users, items = np.nonzero(likes)
    return text_regression(
        torch.from_numpy(vectors).float(),
        torch.from_numpy(users),
        torch.from_numpy(items),
        likes.shape[1],
        rank,
        ridge,
    )


def scores(found, texts: np.ndarray) -> np.ndarray:
    """Of unit texts [S, D] for all items."""
    unit = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    return ((torch.from_numpy(unit).float() - found.mean) @ found.text_map @ found.item_factors.t()).numpy()


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Texts of 12 users, up to three each, and what they like. Users 3 and 4 lack one or the other."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(12, 3, DIM)) + 1.0
    vectors[5, 1:] = vectors[6, 1] = 0
    likes = (rng.random((12, NUM_ITEMS)) < 0.4).astype(float)
    likes[:, 0] = 1  # the most popular item
    vectors[3], likes[4] = 0, 0
    return vectors, likes


@pytest.mark.parametrize("num_texts", [1, 3])
def test_equals_ridge_regression_at_full_rank(drawn, num_texts) -> None:
    """But for one factor: the root mean square of training users' scores is one."""
    vectors, likes = drawn[0][:, :num_texts], drawn[1]
    mean, b, divisors = ridge_in_numpy(vectors, likes)
    found = fitted(vectors, likes)
    np.testing.assert_allclose(found.mean, mean, atol=1e-6)
    texts = np.random.default_rng(1).normal(size=(9, DIM))  # of users that it never saw
    unit = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    expected, result = (unit - mean) @ b / divisors, scores(found, texts)
    ratio = (result * expected).sum() / (expected**2).sum()
    np.testing.assert_allclose(result, ratio * expected, atol=1e-4 * abs(result).max())


def test_the_scale_is_that_of_the_training_users(drawn) -> None:
    """A user's score for an item is the mean over its texts."""
    vectors, likes = drawn[0][:, :1], drawn[1]
    used = [u for u in range(12) if u not in (3, 4)]
    found = scores(fitted(vectors, likes), vectors[used, 0])
    assert np.sqrt((found**2).mean()) == pytest.approx(1.0, rel=1e-4)


def test_a_low_rank_keeps_the_strongest_directions_of_the_fitted_values(drawn) -> None:
    """The best approximation of rank 2, which is what the singular value decomposition says."""
    vectors, likes = drawn[0][:, :1], drawn[1]
    mean, b, divisors = ridge_in_numpy(vectors, likes)
    used = [u for u in range(12) if u not in (3, 4)]
    x = vectors[used, 0] / np.linalg.norm(vectors[used, 0], axis=1, keepdims=True) - mean
    left, strengths, right = np.linalg.svd(x @ b, full_matrices=False)
    expected = (left[:, :2] * strengths[:2]) @ right[:2] / divisors
    expected /= np.sqrt((expected**2).mean())
    np.testing.assert_allclose(scores(fitted(vectors, likes, rank=2), vectors[used, 0]), expected, atol=1e-3)


def test_a_users_texts_weigh_as_much_as_one(drawn) -> None:
    """Saying the same three times, or once beside texts that are not there, changes nothing."""
    one, likes = drawn[0][:, :1], drawn[1]
    expected = fitted(one, likes)
    beside_nothing = np.concatenate([one, np.zeros_like(one)], axis=1)
    for vectors in (np.repeat(one, 3, axis=1), beside_nothing):
        found = fitted(vectors, likes)
        torch.testing.assert_close(found.mean, expected.mean)
        np.testing.assert_allclose(scores(found, one[:2, 0]), scores(expected, one[:2, 0]), atol=1e-4)


def test_users_without_a_text_or_a_like_are_left_out(drawn) -> None:
    vectors, likes = drawn[0][:, :1], drawn[1]
    used = [u for u in range(12) if u not in (3, 4)]
    found, without = fitted(vectors, likes), fitted(vectors[used], likes[used])
    texts = np.random.default_rng(1).normal(size=(4, DIM))
    np.testing.assert_allclose(scores(found, texts), scores(without, texts), atol=1e-4)


def test_a_pair_that_is_in_several_lists_counts_once(drawn) -> None:
    vectors, likes = torch.from_numpy(drawn[0][:, :1]).float(), drawn[1]
    users, items = map(torch.from_numpy, np.nonzero(likes))
    once = text_regression(vectors, users, items, NUM_ITEMS, DIM, RIDGE)
    twice = text_regression(
        vectors, torch.cat([users, users[:9]]), torch.cat([items, items[:9]]), NUM_ITEMS, DIM, RIDGE
    )
    assert all(map(torch.equal, once, twice))


def test_users_with_many_likes_do_not_decide_everything() -> None:
    """Users 0 and 1 say opposite things. 0 likes item 0 alone, 1 likes items 1 to 16: each of these counts 16^-1/4, a half.

    All items have one like, so nothing else differs.
    """
    vectors, likes = np.eye(2)[:, None], np.zeros((2, 17))
    likes[0, 0] = likes[1, 1:] = 1
    found = scores(fitted(vectors, likes, rank=2), vectors[:, 0])
    np.testing.assert_allclose(found[0, 0] / found[1, 1:], 2.0, rtol=1e-4)
    np.testing.assert_allclose(found[1], -found[0], atol=1e-5)


def test_popular_items_are_held_back() -> None:
    """Of three users who say the same, two like item 1 and one likes item 0, so that item 1 scores twice as much,
    less the fourth root of its popularity: (2 + 5) / (1 + 5).
    """
    vectors = np.eye(2)[[0, 0, 0, 1]][:, None]
    likes = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]], float)
    found = scores(fitted(vectors, likes, rank=2), vectors[:1, 0])[0]
    assert found[1] / found[0] == pytest.approx(2 * (6 / 7) ** 0.25, rel=1e-4)


def test_a_stronger_ridge_changes_the_direction_and_not_the_scale(drawn) -> None:
    vectors, likes = drawn[0][:, :1], drawn[1]
    used = [u for u in range(12) if u not in (3, 4)]
    weak, strong = (scores(fitted(vectors, likes, ridge=ridge), vectors[used, 0]) for ridge in (1e-3, 10.0))
    assert np.sqrt((strong**2).mean()) == pytest.approx(np.sqrt((weak**2).mean()), rel=1e-3)
    assert np.corrcoef(weak.ravel(), strong.ravel())[0, 1] < 0.99


def test_there_is_no_map_without_texts_likes_or_differences() -> None:
    vectors, likes = np.random.default_rng(0).normal(size=(6, 2, DIM)), np.eye(6, NUM_ITEMS)
    assert fitted(vectors, likes) is not None
    assert fitted(np.zeros_like(vectors), likes) is None
    assert fitted(vectors, np.zeros_like(likes)) is None
    assert fitted(np.ones_like(vectors), likes) is None, "all texts are the same"
    apart = vectors.copy()
    apart[:3], likes[3:] = 0, 0
    assert fitted(apart, likes) is None, "nobody has both"
