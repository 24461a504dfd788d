"""Figures of the validation users' texts before or after a round: rewards, other users' texts, and counts without a reranker.

Both sides are all N texts of each user, without any selection. `HeldoutMeasure.figures` gives one row per user, `change_of`
what a round did to them (`core.reading_gain`).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo4rec_ray.core.reading_gain import Change, balanced_others, changes
from dpo4rec_ray.core.text_counts import fit_to_later_likes, value_shares, variety
from dpo4rec_ray.knowledge.mentions import MentionFinder
from dpo4rec_ray.knowledge.teacher import text_accuracy
from dpo4rec_ray.rerankers.text_rewards import SampleScorer

Figures = dict[str, np.ndarray]  # figure -> [U] float64, NaN where a user has none
# Figures that are differences of two columns of `heldout`: what is left of the first without the second.
DERIVED = {
    "reading": ("reward", "others_reward"),
    "reading_ndcg": ("ndcg", "others_ndcg"),
    "fit_above": ("fit", "fit_others"),
}
# What the report calls the figures, in its order.
LABELS = {
    "reward": "reward of own texts",
    "others_reward": "reward of other users' texts (change: style gain)",
    "reading": "reading: own minus others (change: reading gain)",
    "ndcg": "NDCG@5 of own texts",
    "others_ndcg": "NDCG@5 of other users' texts",
    "reading_ndcg": "reading in NDCG@5",
    "fit": "share of the user's later likes that have what is named",
    "fit_others": "share of other users' later likes that have it",
    "fit_above": "fit to later likes: own minus others",
    "values": "attribute values named per text",
    "titles_history": "titles named that are in the history",
    "titles_catalogue": "titles named that are only in the catalogue",
    "titles_invented": "titles named that do not exist",
    "distinct_texts": "distinct texts per text of a user",
    "common_opening": "share of texts with the most common opening",
    "words": "words per text",
}


@dataclass(frozen=True)
class UserTexts:
    """The texts of users, each user's next to each other and the users ascending.

    Attributes:
        user_ids: [S] user of each text.
        texts: [S].
        vectors: [S, D].
    """

    user_ids: np.ndarray
    texts: Sequence[str]
    vectors: np.ndarray

    @property
    def users(self) -> np.ndarray:
        """[U] ascending."""
        return np.unique(self.user_ids)

    def of(self, users: np.ndarray) -> UserTexts:
        """The texts of some users."""
        rows = np.flatnonzero(np.isin(self.user_ids, users))
        return UserTexts(self.user_ids[rows], [self.texts[row] for row in rows.tolist()], self.vectors[rows])

    def per_user(self) -> list[list[str]]:
        """[U][N]."""
        bounds = np.searchsorted(self.user_ids, self.users)
        return [[str(text) for text in part] for part in np.split(np.asarray(self.texts, object), bounds[1:])]


class HeldoutMeasure:
    """Measures texts of users against what is known of these users and of the catalogue."""

    def __init__(
        self,
        scorer: SampleScorer,
        titles: Sequence[str],
        attributes: Sequence[Sequence[str]],
        histories: Mapping[int, Collection[int]],
        later_likes: Mapping[int, Collection[int]],
        seed: int,
    ):
        """
        Args:
            scorer: of two metrics: the reward, and NDCG@5 of the lists as drawn.
            titles, attributes: per item id.
            histories: item ids of each user's knowledge history.
            later_likes: item ids that the user liked in the lists of the user's own split.
            seed: of the draw of other users; the same for both sides and for all rounds.
        """
        self._scorer, self._seed = scorer, seed
        self._finder = MentionFinder(titles, attributes)
        number = {name: place for place, name in enumerate(self._finder.values)}
        self._item_values = [[number[name] for name in row if name in number] for row in attributes]
        self._histories, self._likes = histories, later_likes

    def figures(self, sides: Mapping[str, UserTexts]) -> tuple[np.ndarray, dict[str, Figures]]:
        """Users that have a reward on every side [U], and per side their figures: HELDOUT_FIGURES of the schemas."""
        own = {name: self._own(side) for name, side in sides.items()}
        users = functools.reduce(np.intersect1d, (rewarded for rewarded, _ in own.values()))
        found: dict[str, Figures] = {}
        for name, (rewarded, rewards) in own.items():
            rows = np.isin(rewarded, users)
            texts = sides[name].of(users)
            found[name] = {figure: values[rows] for figure, values in rewards.items()}
            if len(users):
                found[name] |= {**self._of_others(texts), **self._counts(texts)}
        return users, found

    def _own(self, texts: UserTexts) -> tuple[np.ndarray, Figures]:
        """Users that have a reward, and the mean reward and NDCG of their own texts."""
        found = self._scorer.rewards(texts.user_ids, texts.vectors).reward  # [S, 2]
        start = np.searchsorted(texts.user_ids, texts.users)
        counts = np.diff(np.append(start, len(found)))
        means = np.add.reduceat(found, start) / counts[:, None] if len(found) else found
        known = np.isfinite(means).all(axis=1)
        return texts.users[known], {"reward": means[known, 0], "ndcg": means[known, 1]}

    def _of_others(self, texts: UserTexts) -> Figures:
        """What other users' texts are worth on each user's lists; NaN where there is one user."""
        users = texts.users
        if len(users) < 2:
            return {name: np.full(len(users), np.nan) for name in ("others_reward", "others_ndcg")}
        start = np.searchsorted(texts.user_ids, users)
        counts = np.diff(np.append(start, len(texts.user_ids)))
        others, samples = balanced_others(len(users), int(counts.max()), self._seed)
        rows = start[others] + samples % counts[others]  # [U, M]
        found = self._scorer.rewards(np.repeat(users, rows.shape[1]), texts.vectors[rows.ravel()]).reward
        means = found.reshape(*rows.shape, 2).mean(axis=1)
        return {"others_reward": means[:, 0], "others_ndcg": means[:, 1]}

    def _counts(self, texts: UserTexts) -> Figures:
        users, per_user = texts.users.tolist(), texts.per_user()
        read = {text: self._finder.find(text) for text in set(texts.texts)}
        shares = value_shares([self._likes.get(user, ()) for user in users], self._item_values)
        fit = fit_to_later_likes([[read[text].values for text in own] for own in per_user], shares)
        looks = variety(per_user)
        found = {"history": [], "catalogue": [], "invented": [], "values": []}
        for user, own in zip(users, per_user, strict=True):
            seen = set(self._histories[user])
            known = [sum(not seen.isdisjoint(items) for items in read[text].titles) for text in own]
            found["history"].append(np.mean(known))
            found["catalogue"].append(np.mean([len(read[text].titles) for text in own]) - np.mean(known))
            found["invented"].append(np.mean([read[text].invented for text in own]))
            found["values"].append(np.mean([len(read[text].values) for text in own]))
        return {
            "fit": fit.own,
            "fit_others": fit.others,
            "values": np.array(found["values"]),
            **{f"titles_{kind}": np.array(found[kind]) for kind in ("history", "catalogue", "invented")},
            "distinct_texts": looks.distinct,
            "common_opening": looks.common_opening,
            "words": looks.words,
        }


def change_of(before: Figures, after: Figures) -> dict[str, Change]:
    """Each figure and those in DERIVED before and after, with intervals over users."""

    def with_derived(figures: Figures) -> Figures:
        return figures | {name: figures[one] - figures[two] for name, (one, two) in DERIVED.items()}

    return changes(with_derived(before), with_derived(after))


def accuracy_stats(texts: UserTexts, tastes: Mapping[int, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Accuracy of the texts by facet where the users' tastes are known; empty where they are not, or of a single user."""
    if len(texts.users) < 2 or not tastes:
        return {}
    found = text_accuracy(texts.per_user(), [tastes[user] for user in texts.users.tolist()])
    return {
        facet: {
            "accuracy": one.accuracy,
            "chance": one.chance,
            "corrected": one.corrected.mean,
            "corrected_ci95": [one.corrected.low, one.corrected.high],
        }
        for facet, one in found.items()
    }
