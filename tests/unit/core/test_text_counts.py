"""Fit to later likes and variety, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dpo4rec_ray.core.text_counts import fit_to_later_likes, opening, value_shares, variety

VALUES = [[0], [0, 1], [2]]  # item -> values


def test_shares_count_an_item_as_often_as_it_was_liked() -> None:
    assert value_shares([[0, 1, 1, 2], []], VALUES) == [{0: 0.75, 1: 0.5, 2: 0.25}, {}]


def test_fit_by_hand() -> None:
    """Shares: user 0 {0: 1, 1: .5}, user 1 {2: 1}, user 2 {0: .5, 2: .5}.

    User 0's texts name {0, 1} (.75 own; others: 0 and .25, mean .125) and {2} (0; others 1 and .5: .75), and nothing once:
    own .375, others .4375. User 1 names 2: own 1, others (0 + .5) / 2. User 2 names nothing.
    """
    shares = value_shares([[0, 1], [2], [0, 2]], VALUES)
    found = fit_to_later_likes([[{0, 1}, {2}, set()], [{2}], [set()]], shares)
    assert found.own == pytest.approx([0.375, 1.0, np.nan], nan_ok=True)
    assert found.others == pytest.approx([0.4375, 0.25, np.nan], nan_ok=True)
    assert (found.own - found.others)[:2] == pytest.approx([-0.0625, 0.75])


def test_texts_that_name_what_everybody_likes_fit_no_better_than_chance() -> None:
    shares = value_shares([[0]] * 4, VALUES)
    found = fit_to_later_likes([[{0}]] * 4, shares)
    assert found.own - found.others == pytest.approx(np.zeros(4))


def test_users_without_likes_have_no_fit_and_are_nobodys_others() -> None:
    shares = value_shares([[0], [], [2]], VALUES)
    found = fit_to_later_likes([[{0}], [{0}], [{2}]], shares)
    assert found.own - found.others == pytest.approx([1.0, np.nan, 1.0], nan_ok=True)
    assert np.isnan(fit_to_later_likes([[{0}], [{0}]], shares[:2]).own).all()
    with pytest.raises(ValueError, match="2 users with texts, 3"):
        fit_to_later_likes([[], []], shares)


def test_variety_by_hand() -> None:
    found = variety(
        [["This user likes a lot of drama", "This user likes a LOT"], ["Something else", "Something else"]]
    )
    assert found.distinct.tolist() == [1.0, 0.5]
    assert found.distinct_overall == 0.75
    # two openings are equally common; the first in the alphabet is the one
    assert found.opening == "something else" and found.common_opening.tolist() == [0.0, 1.0]
    assert found.words.tolist() == [6.0, 2.0]
    assert opening("A b  C d e f") == "a b c d e"
