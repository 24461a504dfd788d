"""Reading, style and the choice of a round, by hand and on made rewards whose parts are known."""

from __future__ import annotations

import numpy as np
import pytest

from dpo4rec_ray.core.reading_gain import Heldout, balanced_others, changes, judge, peaked


@pytest.mark.parametrize(
    ("num_users", "num_samples", "expected"), [(40, 3, 9), (40, 10, 10), (40, 1, 8), (5, 3, 4)]
)
def test_every_text_is_given_equally_often_and_never_to_its_user(
    num_users: int, num_samples: int, expected: int
) -> None:
    others, samples = balanced_others(num_users, num_samples, seed=0)
    assert others.shape == samples.shape == (num_users, expected)
    assert not (others == np.arange(num_users)[:, None]).any()
    assert all(len(set(row)) == expected for row in others.tolist())
    given = np.zeros((num_users, num_samples), int)
    np.add.at(given, (others, samples), 1)
    assert set(given.sum(axis=1).tolist()) == {expected}
    if expected % num_samples == 0:
        assert len(set(given.ravel().tolist())) == 1
    assert not np.array_equal(others, balanced_others(num_users, num_samples, seed=1)[0])


def test_one_user_has_no_others() -> None:
    with pytest.raises(ValueError, match="1 users with 3 texts"):
        balanced_others(1, 3, 0)


def test_style_and_the_lists_cancel_in_reading() -> None:
    """Reward of w's text on u's lists = ease of u's lists + style of the text + 0.3 if u is w: reading is 0.3."""
    rng = np.random.default_rng(0)
    ease, style = rng.normal(size=30), rng.normal(size=(30, 4))
    others, samples = balanced_others(30, 4, seed=0)
    own = ease + style.mean(axis=1) + 0.3
    given = ease + style[others, samples].mean(axis=1)
    assert (own - given).mean() == pytest.approx(0.3)


def test_changes_leave_out_users_without_a_figure() -> None:
    nan = float("nan")
    before = {"a": np.array([1.0, 2.0, 3.0]), "b": np.array([1.0, nan, 3.0]), "c": np.full(3, nan)}
    after = {"a": np.array([2.0, 2.0, 5.0]), "b": np.array([0.0, 1.0, 3.0]), "c": np.ones(3)}
    found = changes(before, after)
    assert list(found) == ["a", "b"]
    assert [one.mean for one in found["a"][:3]] == pytest.approx([2.0, 3.0, 1.0])
    assert [one.mean for one in found["b"][:3]] == pytest.approx([2.0, 1.5, -0.5])
    assert (found["a"].num_users, found["b"].num_users) == (3, 2)
    as_dict = found["a"].as_dict()
    low, high = as_dict["change_ci95"]
    assert as_dict["change"] == pytest.approx(1.0) and 0 <= low < 1 < high <= 2 and as_dict["users"] == 3


def heldout(reward: float, reading: float, noise: float = 0.01) -> Heldout:
    spread = np.linspace(-noise, noise, 50)
    return Heldout(np.arange(50), reward + spread, reading + spread[::-1])


@pytest.mark.parametrize(
    ("reward", "reading", "kept"),
    [
        (0.1, 0.1, True),
        (0.1, 0.0, True),
        (0.1, -0.1, False),  # a manner that pleases the reranker
        (-0.1, 0.1, False),
        (0.0, 0.1, False),  # no higher reward
    ],
)
def test_a_round_is_kept_if_its_reward_rises_and_its_reading_does_not_clearly_fall(
    reward: float, reading: float, kept: bool
) -> None:
    found = judge(heldout(reward, reading), heldout(0.0, 0.0))
    assert found.kept is kept
    assert (found.reward.mean, found.reading.mean) == pytest.approx((reward, reading))


def test_a_fall_of_reading_within_noise_does_not_cost_the_round() -> None:
    noisy = Heldout(np.arange(50), np.full(50, 0.1), np.tile([-1.02, 1.0], 25))
    verdict = judge(noisy, heldout(0.0, 0.0))
    assert verdict.reading.mean < 0 < verdict.reading.high and verdict.kept


def test_rounds_are_compared_over_common_users() -> None:
    one = Heldout(np.array([1, 2, 3]), np.array([0.0, 1.0, 1.0]), np.zeros(3))
    two = Heldout(np.array([2, 3, 9]), np.array([2.0, 2.0, -50.0]), np.zeros(3))
    assert judge(two, one).reward.mean == 1.0 and judge(two, one).kept


def test_rounds_have_peaked_when_the_last_ones_were_not_kept() -> None:
    assert not peaked(1, best=1, patience=1) and peaked(1, best=0, patience=1)
    assert not peaked(2, best=1, patience=2) and peaked(3, best=1, patience=2)
