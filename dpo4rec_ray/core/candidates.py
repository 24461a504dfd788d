"""Candidate lists after the knowledge history, redrawn negatives, and the splits.

The lists follow KAR (arXiv 2306.10933), whose data processing the paper uses. New here: validation users, cross-fit
folds, a split by time, and redraws of the negatives for the same positives, uniform or by weight.
Item ids are 0..num_items-1. All functions work on the events of many users at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo4rec_ray.core.keys import Keys, below, mix, stream
from dpo4rec_ray.errors import UserError

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
SPLITS = ("train", "valid", "test")
# Enough for any list, even if only one item of a large catalogue is left for it.
MAX_ATTEMPTS = 100_000
# Attempts with weights. Lists are still incomplete after them only if a few items hold nearly all of the weight.
WEIGHTED_ATTEMPTS = 100
# Places of lists that are filled at a time. Drawing holds about 60 bytes for each, and a partition may have millions of lists.
PLACES_AT_ONCE = 2**22


@dataclass(frozen=True)
class Events:
    """Events of U users, user after user, each user's in the order of the protocol. An item may come twice.

    Attributes:
        bounds: [U + 1] where each user's events begin and end.
        item_ids, ratings, timestamps_s: [n].
    """

    bounds: IntArray
    item_ids: IntArray
    ratings: FloatArray
    timestamps_s: IntArray

    @property
    def user(self) -> IntArray:
        """[n] the user of each event."""
        return np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))


@dataclass(frozen=True)
class ListPlan:
    """The events of M lists; no item is drawn yet. All [M].

    Attributes:
        number: 0, 1, ... within the user; with windows of test time the place of the list's first event among the user's.
        start: place of the first event among all events.
        size: number of consecutive events.
    """

    user: IntArray
    number: IntArray
    start: IntArray
    size: IntArray


@dataclass(frozen=True)
class Ragged:
    """M sequences of different lengths, one after the other.

    Attributes:
        offsets: [M + 1] where each sequence begins and ends.
        places: [offsets[-1]] places among the events.
    """

    offsets: IntArray
    places: IntArray


def knowledge_cut(num_events: Array | int, cap: int) -> Any:
    """How many of a user's first events the language model may see: half of all, rounded up, and at most `cap`."""
    return np.minimum((np.asarray(num_events) + 1) // 2, cap)


def plan_lists(bounds: IntArray, cuts: IntArray, block_size: int, segment: Array | None = None) -> ListPlan:
    """Each user's events after the knowledge history in blocks of up to `block_size` consecutive ones.

    bounds: [U + 1]; cuts: [U] how many of each user's first events are the knowledge history; segment: [n], a list
    never spans two segments (training, validation and test time).
    """
    num_events = int(bounds[-1])
    user = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    place = np.arange(num_events)
    run_start = (bounds[:-1] + cuts)[user]
    if segment is not None and num_events:
        changes = np.flatnonzero(np.diff(segment, prepend=segment[0]) != 0)
        last_change = np.zeros(num_events, dtype=np.int64)
        last_change[changes] = changes
        run_start = np.maximum(run_start, np.maximum.accumulate(last_change))
    start = np.flatnonzero((place >= run_start) & ((place - run_start) % block_size == 0))
    owner = user[start]
    first_list = np.searchsorted(owner, np.arange(len(bounds) - 1))
    # A list ends where the next one begins, or with its user.
    following = np.append(start[1:], num_events)
    end = np.minimum(following, bounds[1:][owner])
    return ListPlan(owner, np.arange(len(start)) - first_list[owner], start, end - start)


def fill_lists(
    events: Events,
    plan: ListPlan,
    keys: Keys,
    *,
    num_items: int,
    num_candidates: int,
    positive_rating: float,
    avoid_seen: bool,
) -> tuple[IntArray, FloatArray]:
    """The candidates and labels of the lists, [M, L] each: their events, filled up with drawn items, then shuffled.

    Items are drawn uniformly from the catalogue, and none that the list holds. (A list holds an item twice only if its events
    do.) An event rated `positive_rating` or more
    has label 1.0, other events and drawn items 0.0.

    Args:
        keys: [M] random bits of each list; they alone decide which items are drawn, and the order.
        avoid_seen: draw no item that the user has met before or in the list.

    Raises:
        UserError: the catalogue is too small for a list, or leaves too few items that a user has not met.
    """
    _check_catalogue(num_items, num_candidates)
    num_lists = len(plan.start)
    ids = np.zeros((num_lists, num_candidates), dtype=np.int64)
    labels = np.zeros((num_lists, num_candidates), dtype=np.float32)
    labels_of_events = (events.ratings >= positive_rating).astype(np.float32)
    seen = _SeenItems(events, plan, num_items, num_candidates) if avoid_seen else None
    step = max(1, PLACES_AT_ONCE // num_candidates)
    for low in range(0, num_lists, step):
        part = slice(low, low + step)
        own = ListPlan(plan.user[part], plan.number[part], plan.start[part], plan.size[part])
        forbidden = partial(seen, first_list=low) if seen else None
        _fill(
            ids[part], labels[part], events.item_ids, labels_of_events, own, keys[part], num_items, forbidden
        )
    return ids, labels


def _fill(
    ids: IntArray,
    labels: FloatArray,
    items_of_events: IntArray,
    labels_of_events: FloatArray,
    plan: ListPlan,
    keys: Keys,
    num_items: int,
    forbidden: Callable[[IntArray, IntArray], BoolArray] | None,
) -> None:
    """`fill_lists` for some of the lists, in place: ids, labels [M, L]; the others [n] of all events, plan and keys [M]."""
    num_lists, num_candidates = ids.shape
    row = np.repeat(np.arange(num_lists), plan.size)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(plan.size) - plan.size, plan.size)
    place = plan.start[row] + slot
    ids[row, slot] = items_of_events[place]
    labels[row, slot] = labels_of_events[place]
    drawn = np.arange(num_candidates)[None, :] >= plan.size[:, None]
    slots = np.arange(num_candidates)

    def sample(rows: IntArray, attempt: int) -> IntArray:
        return below(stream(mix(keys[rows] ^ np.uint64(attempt))[:, None], slots[None, :]), num_items)

    _draw_distinct(ids, drawn, sample, forbidden)
    order = np.argsort(stream(keys[:, None], num_candidates + slots[None, :]), axis=1)
    ids[:], labels[:] = np.take_along_axis(ids, order, axis=1), np.take_along_axis(labels, order, axis=1)


def histories_before(bounds: IntArray, user: IntArray, start: IntArray, length: int) -> Ragged:
    """The last `length` events of each list's user before the list begins, oldest first. user, start: [M]."""
    sizes = np.minimum(start - bounds[:-1][user], length)
    return ragged(start - sizes, sizes)


def ragged(first: IntArray, sizes: IntArray) -> Ragged:
    """Sequences of consecutive places, given their first places and lengths, [M] each."""
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes)
    return Ragged(offsets, np.repeat(first, sizes) + within)


class _SeenItems:
    """Whether a list's user has met an item before or in the list."""

    def __init__(self, events: Events, plan: ListPlan, num_items: int, num_candidates: int):
        pair = events.user * num_items + events.item_ids
        # Of an item that was met several times the first place counts.
        self._pair, self._place = np.unique(pair, return_index=True)
        self._user, self._end, self._num_items = plan.user, plan.start + plan.size, num_items
        num_met = np.zeros(len(pair) + 1, dtype=np.int64)
        num_met[self._place + 1] = 1
        num_met = np.cumsum(num_met)
        unseen = num_items - (num_met[self._end] - num_met[events.bounds[:-1][plan.user]])
        if np.any(unseen < num_candidates - plan.size):
            raise UserError(
                f"the catalogue has {num_items} items and a user has met all but {unseen.min()} of them: too few are left "
                'to fill a list; use more items, or data.protocol = "user"'
            )

    def __call__(self, rows: IntArray, items: IntArray, first_list: int = 0) -> BoolArray:
        """rows: [m] list numbers from `first_list` on, items: [m, L] -> [m, L]."""
        rows = rows + first_list
        wanted = self._user[rows][:, None] * self._num_items + items
        spot = np.minimum(np.searchsorted(self._pair, wanted), len(self._pair) - 1)
        return (self._pair[spot] == wanted) & (self._place[spot] < self._end[rows][:, None])


def redraw_negatives(
    candidate_item_ids: Array,
    labels: Array,
    num_items: int,
    num_redraws: int,
    rng: np.random.Generator,
    weights: Array | None = None,
) -> tuple[IntArray, FloatArray]:
    """Fresh negatives for the same positives: every place with label <= 0 is drawn anew (beyond the paper).

    candidate_item_ids, labels: [B, L] -> ids, labels: [R, B, L], R = num_redraws. Positives keep their place; drawn
    items come from the catalogue without repeats within a list. Padding is drawn too, like every place without a
    positive: the caller's mask stays valid.

    Without weights all items are equally likely. With weights the items of a list are drawn one after the other, each in
    proportion to the weights of the items that the list does not hold yet. They are then shuffled over the open places:
    likely items are drawn early, and a place must not show how popular its item is. As no item comes twice, the share of
    an item with a large weight is below its weight. Lists that are not full after `WEIGHTED_ATTEMPTS` attempts, because
    few items hold almost all of the weight, are filled up uniformly from the items with a weight above 0.

    Args:
        weights: [num_items] >= 0, in proportion to which items are drawn, 0: never. None: all items are equally likely.

    Raises:
        UserError: the catalogue has fewer items than a list has places, or fewer with a weight above 0; weights are not
            [num_items], or one is negative or not finite.
    """
    num_lists, num_candidates = candidate_item_ids.shape
    _check_catalogue(num_items, num_candidates)
    positive = labels > 0

    def uniform(rows: IntArray, attempt: int) -> IntArray:
        return rng.integers(num_items, size=(len(rows), num_candidates))

    sample = uniform if weights is None else _weighted_sampler(weights, num_items, num_candidates, rng)
    ids = np.empty((num_redraws, num_lists, num_candidates), dtype=np.int64)
    for redraw in ids:  # one redraw of all lists at a time bounds the memory of the drawing
        redraw[:] = candidate_item_ids
        _draw_distinct(redraw, ~positive, sample)
        if weights is not None:
            _shuffle_places(redraw, ~positive, rng)
    kept_labels = np.where(positive, labels, 0.0).astype(np.float32)
    return ids, np.broadcast_to(kept_labels, ids.shape).copy()


def split_users(
    user_ids: Array, test_frac: float, valid_frac: float, num_folds: int, seed: int
) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.int32]]:
    """Each user's split ("train", "valid" or "test") and cross-fit fold (0..num_folds-1), at random by seed.

    user_ids: [U], distinct -> split [U], fold [U]. test_frac is a share of all users, valid_frac of the others; both
    numbers are rounded, and a share above 0 gets at least one user. Folds differ in size by at most one, over all users
    and within each split. A user's split depends on the set of ids and not on their order.

    Raises:
        UserError: no training user is left.
        ValueError: a user id occurs twice.
    """
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


def _weighted_sampler(
    weights: Array, num_items: int, num_candidates: int, rng: np.random.Generator
) -> Callable[[IntArray, int], IntArray]:
    """Draws for `_draw_distinct` in proportion to the weights, and uniform ones after `WEIGHTED_ATTEMPTS` attempts."""
    if weights.shape != (num_items,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise UserError(
            f"weights of negatives must be {num_items} finite numbers >= 0, one per item: got shape {weights.shape}, "
            f"{int((weights < 0).sum())} negative, {int((~np.isfinite(weights)).sum())} not finite"
        )
    possible = np.flatnonzero(weights > 0)
    if len(possible) < num_candidates:
        raise UserError(
            f"only {len(possible)} of {num_items} items have a weight above 0: too few for lists of {num_candidates} "
            "distinct candidates; give every item a small weight"
        )
    total = np.cumsum(weights[possible], dtype=np.float64)
    total /= total[-1]  # ends in exactly 1.0, above any random number

    def sample(rows: IntArray, attempt: int) -> IntArray:
        shape = (len(rows), num_candidates)
        if attempt < WEIGHTED_ATTEMPTS:
            return possible[np.searchsorted(total, rng.random(shape), side="right")]
        return possible[rng.integers(len(possible), size=shape)]

    return sample


def _shuffle_places(ids: IntArray, movable: BoolArray, rng: np.random.Generator) -> None:
    """Shuffle each row's items over its movable places, in place; ids, movable: [M, L]."""
    # The movable places first, then the others in their order.
    places = np.argsort(~movable, axis=1, kind="stable")
    shuffled = np.argsort(np.where(movable, rng.random(ids.shape), 1.0), axis=1, kind="stable")
    np.put_along_axis(ids, places, np.take_along_axis(ids, shuffled, axis=1), axis=1)


def _draw_distinct(
    ids: IntArray,
    drawn: BoolArray,
    sample: Callable[[IntArray, int], IntArray],
    forbidden: Callable[[IntArray, IntArray], BoolArray] | None = None,
) -> None:
    """Fill the places marked in `drawn` [M, L] of `ids` [M, L], in place, without repeats within a row.

    All open places are drawn at once. Places that repeat an item of their row, or hold a forbidden one, are drawn again
    until there are none. The result is the first distinct items in the order drawn: with uniform draws every set of
    allowed items is equally likely; with weights each item is drawn in proportion among those not drawn yet.

    Args:
        sample: rows [m] and the number of the attempt -> items [m, L].
        forbidden: rows [m] and items [m, L] -> which are not allowed there, [m, L].

    Raises:
        UserError: some list still has no valid items after very many attempts.
    """
    rows = np.flatnonzero(drawn.any(axis=1))
    pending = drawn[rows]
    for attempt in range(MAX_ATTEMPTS):
        if not rows.size:
            return
        current = ids[rows]
        current[pending] = sample(rows, attempt)[pending]
        # Equal items become neighbours, the one to keep first, so that only pending places count as repeats.
        order = np.argsort(2 * current + pending, axis=1, kind="stable")
        in_order = np.take_along_axis(current, order, axis=1)
        repeat = np.zeros(current.shape, dtype=np.bool_)
        np.put_along_axis(repeat, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], axis=1)
        if forbidden is not None:
            repeat |= forbidden(rows, current)
        ids[rows] = current
        pending &= repeat
        again = pending.any(axis=1)
        rows, pending = rows[again], pending[again]
    raise UserError(
        f"{rows.size} lists could not be filled with items that their users have not met; use more items"
    )
