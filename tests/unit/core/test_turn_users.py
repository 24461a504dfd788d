"""Which users the turns of a round sample."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpo4rec_ray.core.turn_users import TurnUsers

IDS = np.arange(20_000)
TRAINED, HELD_OUT = np.zeros(len(IDS), bool), np.ones(len(IDS), bool)


def test_a_share_hangs_on_id_and_seed_alone() -> None:
    tenth = TurnUsers(3, 0.1)
    taken = tenth(IDS, TRAINED)
    assert abs(taken.mean() - 0.1) < 0.01 and (tenth(IDS, HELD_OUT) == taken).all()
    assert (tenth(IDS[500:600], TRAINED[:100]) == taken[500:600]).all()
    assert (TurnUsers(3, 0.3)(IDS, TRAINED) | ~taken).all(), "a larger share holds the smaller one"
    assert (TurnUsers(4, 0.1)(IDS, TRAINED) != taken).any()
    assert TurnUsers(3)(IDS, TRAINED).all()


def test_turns_share_the_training_users_out() -> None:
    first = TurnUsers(3, 0.5, 0, 4, 0.2)
    turns = np.stack([replace(first, turn=turn)(IDS, TRAINED) for turn in range(4)])
    assert (turns.sum(axis=0) == TurnUsers(3, 0.5)(IDS, TRAINED)).all(), "each of them in one turn"
    np.testing.assert_allclose(turns.mean(axis=1), first.train_share, atol=0.01)


def test_every_turn_samples_the_same_watched_users() -> None:
    first = TurnUsers(3, 0.5, 0, 4, 0.2)
    turns = [replace(first, turn=turn) for turn in range(4)]
    taken = [turn(IDS, HELD_OUT) for turn in turns]
    assert (taken[0] == TurnUsers(3, 0.5)(IDS, HELD_OUT)).all(), "the first samples all"
    assert (taken[1] == taken[2]).all() and (taken[1] == taken[3]).all()
    assert not (taken[1] & ~taken[0]).any() and abs(taken[1].mean() - turns[1].valid_share) < 0.01
