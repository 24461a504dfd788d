"""Counts over users' texts that need no reranker: how well what they name fits later likes, and how varied they are.

Not in the paper. The fit is read without a reranker: if it is no higher for a user's own later likes than for another
user's, the texts say nothing about their users, whatever a reward says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
OPENING_WORDS = 5


class Fit(NamedTuple):
    """Per user [U], the mean over the user's texts; NaN where no text names a value or no other user has likes.

    Attributes:
        own: mean over the named values of the share of the user's later likes that have the value.
        others: the same for all other users' later likes, each user counted once: what the text would be worth to anybody.
    """

    own: FloatArray
    others: FloatArray


def value_shares(
    likes: Iterable[Collection[int]], values: Sequence[Collection[int]]
) -> list[dict[int, float]]:
    """Per user: value -> share of the user's later liked items that have it. Users without likes: empty.

    likes: item ids per user, an item as often as it was liked; values: value ids per item id.
    """
    shares = []
    for own in likes:
        counts = Counter(value for item in own for value in set(values[item]))
        shares.append({value: count / len(own) for value, count in counts.items()})
    return shares


def fit_to_later_likes(
    named: Sequence[Sequence[Collection[int]]], shares: Sequence[Mapping[int, float]]
) -> Fit:
    """How well the values that each user's texts name fit the user's later likes, and other users'.

    named: value ids of each text of each user, [U][any number]; shares: from `value_shares`, [U]. A text is the mean over
    its named values, a user the mean over the texts that name one. Only users with later likes count as others.

    Raises:
        ValueError: lengths differ.
    """
    if len(named) != len(shares):
        raise ValueError(f"{len(named)} users with texts, {len(shares)} with later likes")
    totals: Counter[int] = Counter()
    for own in shares:
        totals.update(own)
    num_users = sum(bool(own) for own in shares)
    found = np.full((2, len(named)), np.nan)
    for user, (texts, own) in enumerate(zip(named, shares, strict=True)):
        told = [text for text in texts if text]
        if not told or not own or num_users < 2:
            continue
        fit = [np.mean([own.get(value, 0.0) for value in text]) for text in told]
        everybody = [np.mean([totals.get(value, 0.0) for value in text]) for text in told]
        found[0, user] = np.mean(fit)
        found[1, user] = (np.mean(everybody) - np.mean(fit)) / (num_users - 1)
    return Fit(*found)


class Variety(NamedTuple):
    """Per user [U].

    Attributes:
        distinct: distinct texts per text of the user.
        distinct_overall: distinct texts of all users per text, one number.
        common_opening: share of the user's texts that begin with the most common opening.
        opening: that opening.
        words: mean length.
    """

    distinct: FloatArray
    distinct_overall: float
    common_opening: FloatArray
    opening: str
    words: FloatArray


def variety(texts: Sequence[Sequence[str]]) -> Variety:
    """How varied the texts of each user are, and those of all users together: [U][one or more].

    The opening is the first OPENING_WORDS words in lower case; the most common one is that of most texts, ties: the first
    in the alphabet.
    """
    everything = [text for own in texts for text in own]
    openings = [[opening(text) for text in own] for own in texts]
    counts = Counter(one for own in openings for one in own)
    most_common = min(counts, key=lambda one: (-counts[one], one))
    return Variety(
        distinct=np.array([len(set(own)) / len(own) for own in texts]),
        distinct_overall=len(set(everything)) / len(everything),
        common_opening=np.array([own.count(most_common) / len(own) for own in openings]),
        opening=most_common,
        words=np.array([sum(len(text.split()) for text in own) / len(own) for own in texts]),
    )


def opening(text: str) -> str:
    """The first words of a text in lower case."""
    return " ".join(text.lower().split()[:OPENING_WORDS])
