"""The reward of a knowledge text: how well the user's lists are ranked when the user vector is the vector of this text.

Cross-fitting (docs/method.md section 4): the reranker of fold k was trained without the users of fold k and scores only
them; one fold is the paper's way. Beyond the paper, a list is scored several times, with its positives and new negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dpo4rec_ray.core.candidates import redraw_negatives
from dpo4rec_ray.core.rewards import list_rewards
from dpo4rec_ray.rerankers.fit import ListData
from dpo4rec_ray.rerankers.scorer import ListScorer

PLACES_PER_CALL = 2_000_000  # candidates of one scoring call: bounds its memory
YARDSTICK = "ndcg@5 as drawn"  # NDCG@5 on the lists of the stage prepare, without redraws
# Of each other user that a text is tried on. More users say more than more lists of the same users, at the same cost: in the
# demo 16 users with 2 lists each agree better with everybody's lists (within users, r = .94) than 8 with 8 lists (.93).
LISTS_PER_OTHER = 2


@dataclass(frozen=True)
class SampleRewards:
    """Per sample and metric [S, M]; NaN where the user has no list with a positive (for a half: none in that half)."""

    metrics: tuple[str, ...]  # [M]
    reward: np.ndarray  # mean over the user's lists
    half_a: np.ndarray  # mean over a random half of the lists
    half_b: np.ndarray  # mean over the other half
    std_error: np.ndarray  # see `_std_errors`; NaN with one list or one sample
    num_lists: np.ndarray  # [S]


class SampleScorer:
    """Rewards of samples: vectors [S, D] with their users -> one number per sample and metric."""

    def __init__(
        self,
        scorers: Sequence[ListScorer],
        lists: ListData,
        folds: np.ndarray,
        *,
        num_items: int,
        metrics: Sequence[str],
        num_redraws: int,
        seed: int,
        negative_weights: np.ndarray | None = None,
        splits: np.ndarray | None = None,
    ):
        """
        Args:
            scorers: one per fold; a user of fold k is scored by scorers[k].
            lists: in any order; those without a positive give no reward and are left out.
            folds: [num_users] fold of each user id.
            metrics: names that `core.rewards.check_reward` knows, or YARDSTICK.
            num_redraws: 0 keeps the lists as they are. Lists that are shorter than the longest are never redrawn.
            negative_weights: [num_items] how likely an item is drawn as a negative; None: all are equally likely.
            splits: [num_users] split of each user id; a text is tried on other users of its user's split alone. None: all
                users are of one.
        """
        self._scorers, self._folds, self._metrics = list(scorers), folds, tuple(metrics)
        self._splits = np.zeros(len(folds), int) if splits is None else splits
        self._redraws = num_redraws
        keep = torch.nonzero((lists.labels > 0).any(dim=1)).squeeze(1)
        lists = lists.select(keep[torch.argsort(lists.user_ids[keep], stable=True)])
        self._user_ids, self._mask = lists.user_ids.numpy(), lists.mask.numpy()
        self._histories = lists.histories
        item_ids, labels = lists.item_ids.numpy(), lists.labels.numpy()
        rng = np.random.default_rng([seed, 1])
        # The last copy is the lists as they are: YARDSTICK is measured on it alone.
        copies = num_redraws + 1
        self._item_ids = np.repeat(item_ids[None], copies, axis=0)  # [C, n, L]
        self._labels = np.repeat(labels[None], copies, axis=0)
        full = self._mask.all(axis=1)
        if num_redraws and full.any():
            self._item_ids[:-1, full], self._labels[:-1, full] = redraw_negatives(
                item_ids[full], labels[full], num_items, num_redraws, rng, negative_weights
            )
        self._half = _random_halves(self._user_ids, np.random.default_rng([seed, 2]))
        # The rows of each user in a random order: the first few are those that other users' texts are tried on.
        self._shuffled = np.lexsort((np.random.default_rng([seed, 3]).random(len(lists)), self._user_ids))

    def rewards(self, user_ids: np.ndarray, vectors: np.ndarray) -> SampleRewards:
        """user_ids [S] with the samples of a user next to each other, vectors [S, D] -> rewards of the samples."""
        shape = (len(user_ids), len(self._metrics))
        reward, half_a, half_b, std_error = (np.full(shape, np.nan, np.float64) for _ in range(4))
        low = np.searchsorted(self._user_ids, user_ids, side="left")
        num_lists = np.searchsorted(self._user_ids, user_ids, side="right") - low
        for fold, scorer in enumerate(self._scorers):
            mine = np.flatnonzero((self._folds[user_ids] == fold) & (num_lists > 0))
            for part in self._calls(mine, user_ids, num_lists * len(self._item_ids)):
                # P pairs of a sample and one of its user's lists.
                sample = np.repeat(np.arange(len(part)), num_lists[part])
                first_pair = np.cumsum(num_lists[part]) - num_lists[part]
                rows = low[part][sample] + np.arange(len(sample)) - first_pair[sample]
                per_list = self._per_list(scorer, rows, vectors[part], sample, self._metrics)  # [P, M]
                in_a = self._half[rows]
                user = np.unique(user_ids[part], return_inverse=True)[1]
                for place in range(shape[1]):
                    values = per_list[:, place]
                    reward[part, place] = _mean_by(sample, values, len(part))
                    half_a[part, place] = _mean_by(sample[in_a], values[in_a], len(part))
                    half_b[part, place] = _mean_by(sample[~in_a], values[~in_a], len(part))
                    std_error[part, place] = _std_errors(values, sample, rows, user)
        return SampleRewards(self._metrics, reward, half_a, half_b, std_error, num_lists)

    def rewards_of_others(
        self,
        user_ids: np.ndarray,
        vectors: np.ndarray,
        num_others: int,
        seed: int,
        *,
        metrics: Sequence[str] | None = None,
        num_redraws: int = 1,
        lists_per_other: int = LISTS_PER_OTHER,
    ) -> SampleRewards:
        """What each text is worth to other users: rewards of their lists when they are ranked with its vector.

        The others are of the user's fold and split and have a list with a positive; they are drawn by `seed` and the user id
        alone, so that all samples of a user meet the same lists, with the histories of their owners. The reward is the mean
        over the others of the mean over up to `lists_per_other` of their lists, which are the same for every text.

        Args:
            user_ids: [S] with the samples of a user next to each other.
            vectors: [S, D].
            num_others: M; fewer where there are fewer.
            seed: of the draw of the others.
            metrics: of the scorer's; None: all of them.
            num_redraws: of the scorer's redraws; 0, and any number where the scorer has none: the lists as drawn.
            lists_per_other: at most so many lists of each of the others.

        Returns:
            As `rewards` with the other users in the place of lists: the halves are means over every second of the others, and
            num_lists counts the others. NaN for a user without any.
        """
        names = self._metrics if metrics is None else tuple(metrics)
        shape = (len(user_ids), len(names))
        reward, half_a, half_b, std_error = (np.full(shape, np.nan, np.float64) for _ in range(4))
        users, of_sample = np.unique(user_ids, return_inverse=True)
        others = self._others(users, num_others, seed)
        of_user = [self._rows_of(own, lists_per_other) for own in others]
        num_rows = np.array([len(rows) for rows, _ in of_user])[of_sample]
        num_met = np.array([len(own) for own in others])[of_sample]
        copies = len(self._copies(names, num_redraws))
        for fold, scorer in enumerate(self._scorers):
            mine = np.flatnonzero((self._folds[user_ids] == fold) & (num_met > 0))
            for part in self._calls(mine, user_ids, num_rows * copies):
                sample = np.repeat(np.arange(len(part)), num_rows[part])
                rows, place = (np.concatenate([of_user[i][j] for i in of_sample[part]]) for j in (0, 1))
                per_list = self._per_list(scorer, rows, vectors[part], sample, names, num_redraws)
                # Q pairs of a sample and one of its other users.
                met = num_met[part]
                of_pair = np.repeat(np.arange(len(part)), met)
                first_pair = np.cumsum(met) - met
                in_a = (np.arange(len(of_pair)) - first_pair[of_pair]) % 2 == 0
                user = np.unique(user_ids[part], return_inverse=True)[1]
                # Another user is met by several users, with other texts: a list of its own in each user's layout.
                who = np.concatenate([others[i] for i in of_sample[part]])
                cell = user[of_pair] * len(self._folds) + who
                for column in range(shape[1]):
                    values = _mean_by(first_pair[sample] + place, per_list[:, column], len(of_pair))
                    reward[part, column] = _mean_by(of_pair, values, len(part))
                    half_a[part, column] = _mean_by(of_pair[in_a], values[in_a], len(part))
                    half_b[part, column] = _mean_by(of_pair[~in_a], values[~in_a], len(part))
                    std_error[part, column] = _std_errors(values, of_pair, cell, user)
        return SampleRewards(names, reward, half_a, half_b, std_error, num_met)

    def _others(self, users: np.ndarray, num_others: int, seed: int) -> list[np.ndarray]:
        """Up to `num_others` other users with lists for each of `users`, of the same fold and split."""
        known = np.unique(self._user_ids)
        pools: dict[tuple[int, Any], np.ndarray] = {}
        found = []
        for user in users.tolist():
            kind = (int(self._folds[user]), self._splits[user])
            if kind not in pools:
                pools[kind] = known[(self._folds[known] == kind[0]) & (self._splits[known] == kind[1])]
            pool = pools[kind]
            # The user is left out by drawing from one fewer, and stepping over the user's own place.
            own = int(np.searchsorted(pool, user))
            inside = own < len(pool) and pool[own] == user
            size = len(pool) - inside
            drawn = np.random.default_rng([seed, user]).choice(size, min(num_others, size), replace=False)
            found.append(pool[drawn + (inside & (drawn >= own))])
        return found

    def _rows_of(self, others: np.ndarray, lists_per_other: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of up to `lists_per_other` lists of each of the users, and each list's owner as a place in `others`."""
        low = np.searchsorted(self._user_ids, others, side="left")
        count = np.minimum(np.searchsorted(self._user_ids, others, side="right") - low, lists_per_other)
        owner = np.repeat(np.arange(len(others)), count)
        place = np.arange(len(owner)) - (np.cumsum(count) - count)[owner]
        return self._shuffled[low[owner] + place], owner

    def _calls(self, mine: np.ndarray, user_ids: np.ndarray, num_scored: np.ndarray) -> list[np.ndarray]:
        """The samples `mine` in parts that are scored at once: all samples of some users, about PLACES_PER_CALL.

        num_scored: [S] lists, with their copies, that each sample is scored on.
        """
        if not len(mine):
            return []
        # The first sample of each user.
        starts = np.concatenate([[0], np.flatnonzero(np.diff(user_ids[mine])) + 1])
        own = num_scored[mine]
        before = (np.cumsum(own) - own)[starts] * self._item_ids.shape[2] // PLACES_PER_CALL
        return np.split(mine, starts[1:][np.diff(before) > 0])

    def _copies(self, metrics: Sequence[str], num_redraws: int | None) -> list[int]:
        """The copies of the lists that are scored: `num_redraws` redraws (None: all), and the lists as drawn where needed."""
        if num_redraws is None:
            return list(range(len(self._item_ids)))
        redraws = list(range(min(num_redraws, self._redraws)))
        return [*redraws, self._redraws] if YARDSTICK in metrics or not redraws else redraws

    def _per_list(
        self,
        scorer: ListScorer,
        rows: np.ndarray,
        vectors: np.ndarray,
        sample: np.ndarray,
        metrics: Sequence[str],
        num_redraws: int | None = None,
    ) -> np.ndarray:
        """Rewards of each pair of a sample and a list [P, M], averaged over the redraws; see `_copies`."""
        copies, length = self._copies(metrics, num_redraws), self._item_ids.shape[2]
        num_averaged = max(1, sum(copy < self._redraws for copy in copies))
        # The copies of a list stay next to each other: the scorer is fastest when neighbours share a user vector.
        where = (np.array(copies)[None, :], rows[:, None])
        items = self._item_ids[where].reshape(-1, length)
        labels = self._labels[where].reshape(-1, length)
        mask = np.repeat(self._mask[rows], len(copies), axis=0)
        histories = None
        if self._histories is not None:
            histories = self._histories.select(torch.from_numpy(np.repeat(rows, len(copies))))
        scores = scorer.score(items, mask, vectors, np.repeat(sample, len(copies)), histories)
        names = [name.removesuffix(" as drawn") for name in metrics]
        found = list_rewards(scores, labels, list(dict.fromkeys(names)), mask)
        values = {name: column.reshape(-1, len(copies)) for name, column in found.items()}
        return np.stack(
            [
                values[name][:, -1] if metric == YARDSTICK else values[name][:, :num_averaged].mean(1)
                for metric, name in zip(metrics, names, strict=True)
            ],
            axis=1,
        )


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


def _std_errors(values: np.ndarray, sample: np.ndarray, rows: np.ndarray, user: np.ndarray) -> np.ndarray:
    """Standard error of a sample's mean reward when it is compared with the user's other samples.

    A two-way layout per user: reward = effect of the sample + effect of the list + residual. All samples of a user are
    scored on the same lists, so the residuals alone are noise in that comparison.

    values, sample, rows: [P] reward, sample and list of each pair; user: [S] number of each sample's user -> [S].
    """
    num_users = int(user.max()) + 1
    lists, place = np.unique(rows, return_inverse=True)
    of_pair = user[sample]
    residual = (
        values
        - _mean_by(sample, values, len(user))[sample]
        - _mean_by(place, values, len(lists))[place]
        + _mean_by(of_pair, values, num_users)[of_pair]
    )
    num_samples = np.bincount(user, minlength=num_users)
    num_lists = np.bincount(of_pair, minlength=num_users) / num_samples
    freedom = (num_samples - 1) * (num_lists - 1)
    squares = np.bincount(of_pair, residual**2, minlength=num_users)
    variance = np.divide(squares, freedom, out=np.full(num_users, np.nan), where=freedom > 0)
    return np.sqrt(variance / num_lists)[user]
