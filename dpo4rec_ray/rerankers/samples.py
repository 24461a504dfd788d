"""The reward of a knowledge text: how well a user's own lists are ranked when the user vector is this text's.

Cross-fit (method.md section 4): the reranker of fold k never saw the users of fold k, and scores only them; K = 1 is
the paper's way. Beyond the paper, each list is scored over several redraws of its candidates around the same positives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo4rec_ray.core.candidates import redraw_negatives
from dpo4rec_ray.core.rewards import REWARDS
from dpo4rec_ray.rerankers.scorer import ListScorer

LISTS_PER_CALL = 200_000  # bounds the memory of one scoring call


@dataclass(frozen=True)
class UserLists:
    """Candidate lists sorted by user. Only lists with a positive carry a reward; the others are left out here."""

    user_ids: np.ndarray  # [n] ascending
    item_ids: np.ndarray  # [n, L], padded with 0
    labels: np.ndarray  # [n, L]
    mask: np.ndarray  # [n, L]

    @classmethod
    def from_columns(
        cls,
        user_ids: np.ndarray,
        candidate_item_ids: Sequence[Sequence[int]],
        labels: Sequence[Sequence[float]],
    ) -> UserLists:
        width = max(len(row) for row in candidate_item_ids)
        item_ids = np.zeros((len(user_ids), width), np.int64)
        dense_labels = np.zeros((len(user_ids), width), np.float32)
        mask = np.zeros((len(user_ids), width), bool)
        for row, (items, values) in enumerate(zip(candidate_item_ids, labels, strict=True)):
            item_ids[row, : len(items)] = items
            dense_labels[row, : len(items)] = values
            mask[row, : len(items)] = True
        keep = np.flatnonzero(dense_labels.sum(1) > 0)
        keep = keep[np.argsort(user_ids[keep], kind="stable")]
        return cls(user_ids[keep], item_ids[keep], dense_labels[keep], mask[keep])


@dataclass(frozen=True)
class SampleRewards:
    """Per sample, NaN where the user has no list (or no list in that half)."""

    reward: np.ndarray  # [S]
    half_a: np.ndarray  # [S] the same over a random half of the user's lists
    half_b: np.ndarray  # [S] over the other half
    num_lists: np.ndarray  # [S]


class SampleScorer:
    """Rewards of samples: vectors [S, D] with their users -> one number per sample."""

    def __init__(
        self,
        scorers: Sequence[ListScorer],
        lists: UserLists,
        folds: np.ndarray,
        *,
        num_items: int,
        reward: str,
        num_redraws: int,
        seed: int,
    ):
        """
        Args:
            scorers: one per fold; a user of fold k is scored by scorers[k].
            folds: [num_users] fold of each user id.
            num_redraws: 0 keeps the lists as they were drawn. Lists shorter than the widest keep theirs.
        """
        self._scorers, self._lists, self._folds = list(scorers), lists, folds
        self._reward = REWARDS[reward]
        rng = np.random.default_rng([seed, 1])
        self._item_ids = np.repeat(lists.item_ids[None], max(1, num_redraws), axis=0)  # [R, n, L]
        self._labels = np.repeat(lists.labels[None], max(1, num_redraws), axis=0)
        full = lists.mask.all(axis=1)
        if num_redraws and full.any():
            redrawn = redraw_negatives(lists.item_ids[full], lists.labels[full], num_items, num_redraws, rng)
            self._item_ids[:, full], self._labels[:, full] = redrawn
        self._half = _random_halves(lists.user_ids, np.random.default_rng([seed, 2]))

    def rewards(self, user_ids: np.ndarray, vectors: np.ndarray) -> SampleRewards:
        """user_ids [S], vectors [S, D] -> rewards; samples of one user are best passed together."""
        reward, half_a, half_b = (np.full(len(user_ids), np.nan, np.float64) for _ in range(3))
        low = np.searchsorted(self._lists.user_ids, user_ids, side="left")
        num_lists = np.searchsorted(self._lists.user_ids, user_ids, side="right") - low
        step = max(1, LISTS_PER_CALL // max(1, len(self._item_ids) * int(num_lists.max(initial=1))))
        for fold, scorer in enumerate(self._scorers):
            mine = np.flatnonzero((self._folds[user_ids] == fold) & (num_lists > 0))
            for start in range(0, len(mine), step):
                part = mine[start : start + step]
                sample = np.repeat(np.arange(len(part)), num_lists[part])
                offset = np.arange(len(sample)) - np.repeat(
                    np.cumsum(num_lists[part]) - num_lists[part], num_lists[part]
                )
                rows = low[part][sample] + offset
                per_list = self._per_list(scorer, rows, vectors[part], sample)
                in_a = self._half[rows]
                reward[part] = _mean_by(sample, per_list, len(part))
                half_a[part] = _mean_by(sample[in_a], per_list[in_a], len(part))
                half_b[part] = _mean_by(sample[~in_a], per_list[~in_a], len(part))
        return SampleRewards(reward, half_a, half_b, num_lists)

    def _per_list(
        self, scorer: ListScorer, rows: np.ndarray, vectors: np.ndarray, sample: np.ndarray
    ) -> np.ndarray:
        """Reward of each (sample, list) pair [P], averaged over the redraws."""
        redraws, length = len(self._item_ids), self._item_ids.shape[2]
        items = (
            self._item_ids[:, rows].transpose(1, 0, 2).reshape(-1, length)
        )  # lists of one sample stay neighbours
        labels = self._labels[:, rows].transpose(1, 0, 2).reshape(-1, length)
        mask = np.repeat(self._lists.mask[rows], redraws, axis=0)
        scores = scorer.score(items, mask, vectors, np.repeat(sample, redraws))
        return self._reward(scores, labels, mask).reshape(-1, redraws).mean(1)


def _random_halves(user_ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """True for a random half of each user's lists; `user_ids` [n] ascending."""
    order = np.lexsort((rng.random(len(user_ids)), user_ids))
    rank = np.arange(len(user_ids)) - np.searchsorted(user_ids, user_ids, side="left")
    half = np.empty(len(user_ids), bool)
    half[order] = rank % 2 == 0
    return half


def _mean_by(group: np.ndarray, values: np.ndarray, num_groups: int) -> np.ndarray:
    counts = np.bincount(group, minlength=num_groups)
    sums = np.bincount(group, values, minlength=num_groups)
    return np.divide(sums, counts, out=np.full(num_groups, np.nan), where=counts > 0)
