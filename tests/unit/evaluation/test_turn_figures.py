"""The watched users' curve over the turns of a round, and what it warns of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpo4rec_ray.evaluation.turn_figures import lines, turn_figures, user_figures, warnings

USERS, SAMPLES = np.arange(3, 43), 4


def turn(
    reward: float, others: float, texts: list[str], users: np.ndarray = USERS
) -> tuple[pa.Table, pa.Table]:
    """Scores and texts, in no order, of users who differ by a little."""
    noise = np.random.default_rng(0).normal(size=(60, SAMPLES)) / 100
    ids = {"user_id": np.repeat(users, SAMPLES), "sample_id": np.tile(np.arange(SAMPLES), len(users))}
    noise = (noise + np.arange(60)[:, None])[users].ravel()
    scores = {**ids, "plain_reward": reward + noise, "others_reward": others + noise}
    order = np.random.default_rng(1).permutation(len(noise))
    return pa.table(scores).take(order), pa.table({**ids, "text": texts * len(users)}).take(order[::-1])


VARIED = ["likes drama", "likes old films", "a", "b c d e"]


def figures(reward: float, others: float, texts: list[str] = VARIED) -> dict[str, dict[str, Any]]:
    """Against a first turn of reward 0, with more users than are watched."""
    first = user_figures(*turn(0.0, 0.0, VARIED, np.arange(60)), USERS)
    return turn_figures(first, user_figures(*turn(reward, others, texts), USERS))


def test_figures_are_means_over_texts_then_users() -> None:
    users, found = user_figures(*turn(0.0, 0.0, ["one", "one", "two words", "one"]), USERS[:2])
    assert users.tolist() == USERS[:2].tolist()
    assert found["words"].tolist() == [1.25, 1.25] and found["distinct"].tolist() == [0.5, 0.5]
    np.testing.assert_allclose(found["reading"], found["reward"] - found["style"])


def test_what_rises_for_anybody_alone_is_a_manner() -> None:
    found = figures(0.5, 0.5)
    assert found["reward"]["change"] == pytest.approx(0.5, abs=1e-6) and found["reward"]["users"] == len(
        USERS
    )
    assert found["reading"]["change"] == pytest.approx(0.0, abs=1e-6)
    [warning] = warnings(figures(0.5, 0.51))
    assert "a manner is learned" in warning
    assert not list(warnings(figures(0.5, 0.1))), "most of it is about the user"


def test_longer_and_poorer_texts_are_warned_of() -> None:
    [longer] = warnings(figures(0.1, 0.0, [f"{text} {'very ' * 9}" for text in VARIED]))
    assert "token_weights" in longer
    [poorer] = warnings(figures(0.1, 0.0, ["a b"] * SAMPLES))
    assert "25% of a user's texts are distinct, 100%" in poorer


def test_a_turn_says_how_its_users_fare() -> None:
    [line] = lines(figures(0.5, 0.1))
    assert (
        line.startswith("40 watched users since the round began: reward +0.5000") and "style +0.1000" in line
    )


def test_without_other_users_there_is_no_reading() -> None:
    found = figures(0.5, np.nan)
    assert "reading" not in found and found["reward"]["change"] == pytest.approx(0.5, abs=1e-6)
    assert len(list(lines(found))) == 1


def test_nobody_is_watched() -> None:
    none = user_figures(*turn(0.0, 0.0, VARIED), np.zeros(0, np.int64))
    assert turn_figures(none, none) == {} and not list(lines({})) and not list(warnings({}))
