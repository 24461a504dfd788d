"""What texts add to the likelihood of liked items, in standard errors."""

from __future__ import annotations

import numpy as np
import pytest

from dpo4rec_ray.core.evidence import evidence_of_texts

USERS = np.arange(200)


def world(strength: float, noise: float, seed: int = 0):
    """200 lists of 10 with one positive, which `strength` lifts in `without` and `noise` in `added`."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((200, 10))
    labels[:, 0] = 1
    without = rng.normal(size=(200, 10)) + strength * labels
    added = rng.normal(size=(200, 10)) + noise * labels
    return without, added, labels, np.ones((200, 10), bool)


@pytest.mark.parametrize("seed", range(5))
def test_what_lifts_the_liked_items_is_evidence_and_noise_is_not(seed):
    without, added, labels, mask = world(1.0, 0.8, seed)
    assert evidence_of_texts(without, without + added, labels, mask, USERS) > 4
    without, added, labels, mask = world(1.0, 0.0, seed)
    assert evidence_of_texts(without, without + added, labels, mask, USERS) < 1.645
    assert evidence_of_texts(without, without, labels, mask, USERS) == 0


def test_a_backbone_that_is_too_sure_neither_makes_nor_hides_evidence():
    """Scores four times as large say the same; scores that are merely smaller say nothing new."""
    without, added, labels, mask = world(1.0, 0.8)
    fair = evidence_of_texts(without, without + added, labels, mask, USERS)
    sure = evidence_of_texts(4 * without, 4 * (without + added), labels, mask, USERS)
    assert sure == pytest.approx(fair, rel=0.2)
    flatter = evidence_of_texts(8 * without, 2 * without, labels, mask, USERS)
    assert flatter < 1.645


def test_too_strong_a_text_is_still_evidence():
    without, added, labels, mask = world(1.0, 0.8)
    assert evidence_of_texts(without, without + 6 * added, labels, mask, USERS) > 3


def test_a_user_with_many_lists_counts_as_one():
    without, added, labels, mask = world(1.0, 0.8)
    alone = evidence_of_texts(without, without + added, labels, mask, USERS)
    repeated = [np.repeat(one, 4, axis=0) for one in (without, without + added, labels, mask, USERS)]
    assert evidence_of_texts(*repeated) == pytest.approx(alone, rel=0.01)


def test_padding_and_lists_without_a_positive_say_nothing():
    without, added, labels, mask = world(1.0, 0.8)
    after = without + added
    plain = evidence_of_texts(without, after, labels, mask, USERS)

    def wider(values, fill):
        return np.hstack([values, np.full((200, 2), fill)])

    wide = evidence_of_texts(
        wider(without, np.nan), wider(after, 1e6), wider(labels, 0), wider(mask, False), USERS
    )
    assert wide == pytest.approx(plain)

    def longer(values):
        return np.concatenate([values, values[:9]])

    empty = np.vstack([labels, np.zeros((9, 10))])
    more = evidence_of_texts(longer(without), longer(after), empty, longer(mask), longer(USERS))
    assert more == pytest.approx(plain)
    assert evidence_of_texts(without, after, np.zeros_like(labels), mask, USERS) == 0
