"""Candidate lists after the knowledge history, redrawn negatives, and the split of users.

The lists follow KAR (arXiv 2306.10933), whose data processing the paper uses. Departs from it: a validation
share of the training users, cross-fit folds, and redraws of the negatives for the same positives. Item ids
are 0..num_items-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo4rec_ray.errors import UserError

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CandidateList:
    """One list to rerank. H <= history_length, L = num_candidates."""

    timestamp_s: int  # of the block's first event
    history_item_ids: IntArray  # [H], oldest first
    history_ratings: FloatArray  # [H]
    candidate_item_ids: IntArray  # [L], distinct
    labels: FloatArray  # [L], 1.0 or 0.0


def knowledge_cut(num_events: int, cap: int) -> int:
    """How many of a user's first events the language model may see: half, rounded up, at most `cap`."""
    return min((num_events + 1) // 2, cap)


def build_lists(
    item_ids: Array,
    ratings: Array,
    timestamps_s: Array,
    cut: int,
    *,
    num_items: int,
    block_size: int,
    num_candidates: int,
    positive_rating: float,
    history_length: int,
    rng: np.random.Generator,
) -> list[CandidateList]:
    """One user's events after the knowledge history, as lists of candidates; empty when no event is left.

    Each list holds up to `block_size` consecutive events and is filled to `num_candidates` with other items
    drawn uniformly from the catalogue, then shuffled. An item met twice in a block is one candidate, positive
    if any of its events is. Its history is the last `history_length` events before the block, which may reach
    into the knowledge history.

    Args:
        item_ids: [n] the user's items in the order of the protocol.
        ratings: [n].
        timestamps_s: [n].
        cut: events before this place belong to the knowledge history.
        num_items: size of the catalogue.
        block_size: events per list; the last list may have fewer.
        num_candidates: L.
        positive_rating: an event rated this or more gets label 1.0; other events and drawn items get 0.0.
        history_length: the most events in a list's history.
        rng: consumed; the same state gives the same lists.

    Raises:
        UserError: block_size is not within 1..num_candidates, or the catalogue has fewer than num_candidates
            items.
    """
    if not 1 <= block_size <= num_candidates:
        raise UserError(f"block_size = {block_size} must lie between 1 and num_candidates = {num_candidates}")
    _check_catalogue(num_items, num_candidates)
    starts = range(cut, len(item_ids), block_size)
    ids = np.zeros((len(starts), num_candidates), dtype=np.int64)
    labels = np.zeros((len(starts), num_candidates), dtype=np.float32)
    drawn = np.ones((len(starts), num_candidates), dtype=np.bool_)
    for row, start in enumerate(starts):
        label_of: dict[int, float] = {}
        block = slice(start, start + block_size)
        for item, rating in zip(item_ids[block], ratings[block], strict=True):
            label_of[int(item)] = max(label_of.get(int(item), 0.0), float(rating >= positive_rating))
        ids[row, : len(label_of)] = list(label_of)
        labels[row, : len(label_of)] = list(label_of.values())
        drawn[row, : len(label_of)] = False
    _draw_distinct(ids, drawn, num_items, rng)
    order = np.argsort(rng.random(ids.shape), axis=1)
    ids = np.take_along_axis(ids, order, axis=1)
    labels = np.take_along_axis(labels, order, axis=1)
    return [
        CandidateList(
            timestamp_s=int(timestamps_s[start]),
            history_item_ids=item_ids[max(0, start - history_length) : start].astype(np.int64),
            history_ratings=ratings[max(0, start - history_length) : start].astype(np.float32),
            candidate_item_ids=ids[row],
            labels=labels[row],
        )
        for row, start in enumerate(starts)
    ]


def redraw_negatives(
    candidate_item_ids: Array, labels: Array, num_items: int, num_redraws: int, rng: np.random.Generator
) -> tuple[IntArray, FloatArray]:
    """Fresh negatives for the same positives: every place with label <= 0 is drawn anew (beyond the paper).

    candidate_item_ids, labels: [B, L] -> ids, labels: [R, B, L], R = num_redraws. Positives keep their place;
    drawn items come uniformly from the catalogue without repeats within a list. Padding counts as any other
    place without a positive and is drawn too: the caller's mask goes on holding.

    Raises:
        UserError: the catalogue has fewer items than a list has places.
    """
    num_lists, num_candidates = candidate_item_ids.shape
    _check_catalogue(num_items, num_candidates)
    positive = labels > 0
    ids = np.empty((num_redraws, num_lists, num_candidates), dtype=np.int64)
    for redraw in ids:  # one redraw of all lists at a time bounds the memory of the drawing
        redraw[:] = candidate_item_ids
        _draw_distinct(redraw, ~positive, num_items, rng)
    kept_labels = np.where(positive, labels, 0.0).astype(np.float32)
    return ids, np.broadcast_to(kept_labels, ids.shape).copy()


def split_users(
    user_ids: Array, test_frac: float, valid_frac: float, num_folds: int, seed: int
) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.int32]]:
    """Each user's split ("train", "valid" or "test") and cross-fit fold (0..num_folds-1), at random by seed.

    user_ids: [U], distinct -> split [U], fold [U]. test_frac is a share of all users, valid_frac of the
    others; both are rounded, and a share above 0 gets at least one user. Folds differ in size by at most one,
    over all users and within each split. A user's split depends on the set of ids and not on their order.

    Raises:
        UserError: a share is outside [0, 1), num_folds < 1, or no training user is left.
        ValueError: a user id occurs twice.
    """
    if not 0 <= test_frac < 1 or not 0 <= valid_frac < 1 or num_folds < 1:
        raise UserError(
            f"test_frac = {test_frac} and valid_frac = {valid_frac} must lie in [0, 1), "
            f"num_folds = {num_folds} must be at least 1"
        )
    num_users = len(user_ids)
    if len(np.unique(user_ids)) != num_users:
        raise ValueError("a user id occurs twice: split_users wants one entry per user")
    num_test = _share(test_frac, num_users)
    num_valid = _share(valid_frac, num_users - num_test)
    if num_test + num_valid >= num_users:
        raise UserError(
            f"{num_users} users leave none for training (test {num_test}, valid {num_valid}): "
            "use more users or smaller test_frac and valid_frac"
        )
    rng = np.random.default_rng(seed)
    places = np.argsort(user_ids)[rng.permutation(num_users)]
    split = np.full(num_users, "train", dtype="<U5")
    split[places[:num_test]] = "test"
    split[places[num_test : num_test + num_valid]] = "valid"
    fold = np.empty(num_users, dtype=np.int32)
    fold[places] = np.arange(num_users) % num_folds
    return split, fold


def _share(frac: float, num_users: int) -> int:
    return max(1, round(frac * num_users)) if frac > 0 else 0


def _check_catalogue(num_items: int, num_candidates: int) -> None:
    if num_items < num_candidates:
        raise UserError(
            f"a list of {num_candidates} distinct candidates cannot be drawn from a catalogue of {num_items} "
            "items: lower num_candidates or use more items"
        )


def _draw_distinct(
    ids: IntArray, drawn: npt.NDArray[np.bool_], num_items: int, rng: np.random.Generator
) -> None:
    """Fill the places marked in `drawn` [M, L] of `ids` [M, L], in place, without repeats within a row.

    All open places are drawn at once; those that repeat an item of their row are drawn again until none does.
    Items that are not in the row to begin with are treated alike, so every set of them is equally likely.
    """
    rows = np.flatnonzero(drawn.any(axis=1))
    pending = drawn[rows]
    while rows.size:
        current = ids[rows]
        current[pending] = rng.integers(num_items, size=int(pending.sum()))
        # Equal items become neighbours, the settled one first, so that only pending places count as repeats.
        order = np.argsort(2 * current + pending, axis=1, kind="stable")
        in_order = np.take_along_axis(current, order, axis=1)
        repeat = np.zeros(current.shape, dtype=np.bool_)
        np.put_along_axis(repeat, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], axis=1)
        ids[rows] = current
        pending &= repeat
        again = pending.any(axis=1)
        rows, pending = rows[again], pending[again]
