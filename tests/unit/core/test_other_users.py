from __future__ import annotations

import numpy as np
import pytest

from dpo4rec_ray.core.other_users import draw_others, taste_vectors


def drawn(similarity: np.ndarray, count: int, hardness: float) -> set[int]:
    """Everybody that some seed draws."""
    return {
        place
        for seed in range(200)
        for place in draw_others(similarity, count, hardness, np.random.default_rng(seed)).tolist()
    }


def test_at_random_everybody_but_the_user() -> None:
    similarity = np.array([0.3, -np.inf, 0.9, 0.0])
    assert drawn(similarity, 1, 0.0) == {0, 2, 3}
    assert sorted(draw_others(similarity, 9, 0.0, np.random.default_rng(0)).tolist()) == [0, 2, 3]


def test_the_harder_the_more_alike_but_never_the_same() -> None:
    """Of 40 candidates in order of similarity, the 5 % most alike, 39 and 38, are never drawn; .5 leaves the next 19."""
    similarity = np.arange(41.0)
    similarity[40] = -np.inf
    assert drawn(similarity, 1, 0.5) == set(range(19, 38))
    assert drawn(similarity, 1, 1.0) == {37}
    assert drawn(similarity, 3, 1.0) == {35, 36, 37}, "as many as are asked for"


def test_nobody_else_and_a_wrong_hardness() -> None:
    assert len(draw_others(np.array([-np.inf]), 2, 0.5, np.random.default_rng(0))) == 0
    with pytest.raises(ValueError, match=r"1.5 is not in \[0, 1\]"):
        draw_others(np.zeros(2), 1, 1.5, np.random.default_rng(0))


def test_tastes_by_hand() -> None:
    """Items at (0, 0), (2, 0), (0, 2), (2, 2): the mean is (1, 1), so they lie at (-1, -1), (1, -1), (-1, 1), (1, 1).

    User 0 likes items 1 and 3 of three: (1, 0). User 1 likes none: all of the history, items 0 and 2: (-1, 0). User 2 has no
    history.
    """
    items = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    histories = [np.array([1, 0, 3]), np.array([0, 2]), np.array([], int)]
    liked = [np.array([True, False, True]), np.array([False, False]), np.array([], bool)]
    np.testing.assert_allclose(taste_vectors(histories, liked, items), [[1, 0], [-1, 0], [0, 0]])
