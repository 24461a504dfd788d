from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_ray.core.candidates import (
    Events,
    ListPlan,
    fill_lists,
    histories_before,
    knowledge_cut,
    plan_lists,
    redraw_negatives,
    split_users,
)
from dpo4rec_ray.core.keys import stream
from dpo4rec_ray.core.time_windows import first_segment_sizes
from dpo4rec_ray.errors import UserError


def events_of(*users: list[int], step_s: int = 1) -> Events:
    """Users with these items, rated 5, 4, 3, 2, 1, 5, ... at times 100, 100 + step, ..."""
    sizes = np.array([len(items) for items in users])
    within = np.concatenate([np.arange(size) for size in sizes] or [[]]).astype(np.int64)
    return Events(
        bounds=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        item_ids=np.concatenate([*(np.array(items, dtype=np.int64) for items in users)]),
        ratings=(5 - within % 5).astype(np.float32),
        timestamps_s=100 + step_s * within,
    )


def fill(
    events: Events,
    plan: ListPlan,
    num_items: int,
    seed: int = 0,
    num_candidates: int = 10,
    avoid_seen: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    return fill_lists(
        events,
        plan,
        stream(np.full(len(plan.start), seed, np.uint64), np.arange(len(plan.start))),
        num_items=num_items,
        num_candidates=num_candidates,
        positive_rating=4,
        avoid_seen=avoid_seen,
    )


@pytest.mark.parametrize(
    ("num_events", "cap", "cut"),
    [(0, 30, 0), (1, 30, 1), (2, 30, 1), (7, 30, 4), (8, 30, 4), (59, 30, 30), (100, 30, 30)],
)
def test_knowledge_cut(num_events: int, cap: int, cut: int) -> None:
    """min((n + 1) // 2, cap): half of the events, rounded up, but at most the cap."""
    assert knowledge_cut(num_events, cap) == cut


def test_blocks_by_hand() -> None:
    """Users of 11, 0, 3 and 6 events, cuts 4, 0, 3 and 3.

    User 0: events 4 5 6 7 and 8 9 10. User 2 has nothing left. User 3 begins at place 14: events 17 18 19.
    Ratings 5 4 3 2 1 repeat, so items 5, 6 and 10 of user 0 are positive, and 103, 104 of user 3 are not.
    """
    events = events_of(list(range(11)), [], [50, 51, 52], list(range(100, 106)))
    plan = plan_lists(events.bounds, np.array([4, 0, 3, 3]), 4)
    assert plan.user.tolist() == [0, 0, 3]
    assert plan.number.tolist() == [0, 1, 0]
    assert plan.start.tolist() == [4, 8, 17]
    assert plan.size.tolist() == [4, 3, 3]
    before = histories_before(events.bounds, plan.user, plan.start, 5)
    assert np.diff(before.offsets).tolist() == [4, 5, 3]
    assert events.item_ids[before.places].tolist() == [0, 1, 2, 3, 3, 4, 5, 6, 7, 100, 101, 102]
    ids, labels = fill(events, plan, 200)
    assert ids.shape == labels.shape == (3, 10)
    assert {4, 5, 6, 7} <= set(ids[0]) and {8, 9, 10} <= set(ids[1]) and {103, 104, 105} <= set(ids[2])
    assert [set(row[label == 1]) for row, label in zip(ids, labels, strict=True)] == [{5, 6}, {10}, {105}]


def test_a_list_never_spans_a_cut_in_time() -> None:
    """10 events, cut 2, segments 0 0 0 0 0 1 1 2 2 2: lists 2 3 4 | 5 6 | 7 8 9; a second user is cut in segment 1."""
    events = events_of(list(range(10)), list(range(20, 25)))
    segment = np.array([0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 1, 1, 1, 2, 2])
    assert first_segment_sizes(events.bounds, segment).tolist() == [5, 3]
    plan = plan_lists(events.bounds, np.array([2, 2]), 4, segment)
    assert plan.start.tolist() == [2, 5, 7, 12, 13]
    assert plan.size.tolist() == [3, 2, 3, 1, 2]
    assert plan.number.tolist() == [0, 1, 2, 0, 1]


@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    cap=st.integers(0, 12),
    block_size=st.integers(1, 6),
    extra=st.integers(0, 6),
    num_spare=st.integers(0, 30),
    history_length=st.integers(0, 7),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_lists_never_leak_and_never_repeat(
    sizes: list[int], cap: int, block_size: int, extra: int, num_spare: int, history_length: int, seed: int
) -> None:
    """For any users and any catalogue, even one that just fills a list: against a plain loop over users."""
    num_candidates = block_size + extra
    num_items = max(num_candidates, *sizes) + num_spare
    rng = np.random.default_rng(seed)
    events = events_of(*(rng.permutation(num_items)[:size].tolist() for size in sizes))
    cuts = knowledge_cut(np.array(sizes), cap)
    plan = plan_lists(events.bounds, cuts, block_size)
    ids, labels = fill(events, plan, num_items, seed, num_candidates)
    before = histories_before(events.bounds, plan.user, plan.start, history_length)
    made = 0
    for user, size in enumerate(sizes):
        items = events.item_ids[events.bounds[user] : events.bounds[user + 1]]
        ratings = events.ratings[events.bounds[user] : events.bounds[user + 1]]
        for number, start in enumerate(range(cuts[user], size, block_size)):
            block = slice(start, start + block_size)
            assert (plan.user[made], plan.number[made]) == (user, number)
            shown = before.places[before.offsets[made] : before.offsets[made + 1]]
            assert events.item_ids[shown].tolist() == items[max(0, start - history_length) : start].tolist()
            row = ids[made].tolist()
            assert len(set(row)) == num_candidates
            assert all(0 <= item < num_items for item in row)
            assert set(items[block].tolist()) <= set(row)
            positives = {
                item for item, rating in zip(items[block], ratings[block], strict=True) if rating >= 4
            }
            assert {item for item, label in zip(row, labels[made], strict=True) if label == 1} == positives
            assert set(labels[made].tolist()) <= {0.0, 1.0}
            made += 1
    assert made == len(plan.start)


@given(num_events=st.integers(4, 20), spare=st.integers(0, 12), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_no_seen_item_is_drawn(num_events: int, spare: int, seed: int) -> None:
    """Nothing met before or in a list is drawn for it; what the user meets later may be. Or the error says so."""
    rng = np.random.default_rng(seed)
    num_items = num_events + spare
    events = events_of(
        rng.permutation(num_items)[:num_events].tolist(), rng.permutation(num_items)[:4].tolist()
    )
    plan = plan_lists(events.bounds, np.array([2, 2]), 2)
    unseen = num_items - (plan.start + plan.size - events.bounds[plan.user])
    if num_items < 6 or (unseen < 6 - plan.size).any():
        with pytest.raises(UserError, match=r"too few are left|cannot be drawn"):
            fill(events, plan, num_items, seed, num_candidates=6, avoid_seen=True)
        return
    ids, _ = fill(events, plan, num_items, seed, num_candidates=6, avoid_seen=True)
    for row, user, start, size in zip(ids, plan.user, plan.start, plan.size, strict=True):
        met = set(events.item_ids[events.bounds[user] : start + size].tolist())
        assert set(row.tolist()) & met == set(events.item_ids[start : start + size].tolist())


def test_lists_depend_on_their_key_alone() -> None:
    """The same keys give the same lists to the last place, whatever other users are in the partition."""
    one, two = events_of(list(range(30))), events_of(list(range(40, 52)), list(range(30)))
    plan, plan_two = plan_lists(one.bounds, np.array([6]), 4), plan_lists(two.bounds, np.array([12, 6]), 4)
    for left, right in zip(fill(one, plan, 200, seed=3), fill(two, plan_two, 200, seed=3), strict=True):
        np.testing.assert_array_equal(left, right)
    assert (fill(one, plan, 200, seed=3)[0] != fill(one, plan, 200, seed=4)[0]).any()


def test_drawn_items_and_places_are_uniform() -> None:
    """4,000 lists with one event (item 0) and 3 drawn of the other 9 items.

    Each of the 9 is in 1/3 of the lists, and item 0 in each place 1/4 of the time.
    """
    events = Events(
        np.arange(4001), np.zeros(4000, np.int64), np.full(4000, 5.0, np.float32), np.arange(4000)
    )
    plan = plan_lists(events.bounds, np.zeros(4000, np.int64), 1)
    ids, _ = fill(events, plan, 10, num_candidates=4)
    counts = np.bincount(ids.ravel(), minlength=10)
    assert counts[0] == 4000
    np.testing.assert_allclose(counts[1:] / 4000, 1 / 3, atol=0.035)  # 4.5 standard deviations
    np.testing.assert_allclose((ids == 0).mean(axis=0), 1 / 4, atol=0.035)


def test_no_event_after_the_cut_gives_no_list() -> None:
    events = events_of([1, 2, 3, 4], [])
    assert len(plan_lists(events.bounds, np.array([4, 0]), 4).start) == 0
    nobody = plan_lists(np.zeros(1, np.int64), np.zeros(0, np.int64), 4)
    assert fill(events_of([]), nobody, 20)[0].shape == (0, 10)


def test_impossible_sizes_are_the_users_mistake() -> None:
    events = events_of(list(range(8)))
    with pytest.raises(UserError, match="catalogue of 9 items"):
        fill(events, plan_lists(events.bounds, np.array([4]), 4), 9)
    with pytest.raises(UserError, match="catalogue of 2 items"):
        redraw_negatives(np.array([[0, 1, 2]]), np.array([[1, 0, 0]]), 2, 1, np.random.default_rng(0))


def test_redraw_keeps_positives_in_place() -> None:
    """Positives 7 and 9 stay where they are; place 1 and the padded place 3 are drawn; labels follow."""
    ids, labels = redraw_negatives(
        np.array([[7, 3, 9, 0]]), np.array([[1.0, 0.0, 1.0, 0.0]]), 50, 6, np.random.default_rng(0)
    )
    assert ids.shape == labels.shape == (6, 1, 4)
    assert (ids[:, 0, [0, 2]] == [7, 9]).all()
    assert (labels == [1.0, 0.0, 1.0, 0.0]).all()
    assert len({tuple(places) for places in ids[:, 0, [1, 3]].tolist()}) > 1
    assert labels.flags.writeable


@given(
    num_lists=st.integers(0, 12),
    num_places=st.integers(1, 8),
    num_spare=st.integers(0, 20),
    positive_frac=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=120, deadline=None)
def test_redraw_never_repeats(
    num_lists: int, num_places: int, num_spare: int, positive_frac: float, seed: int
) -> None:
    """No item twice in a list, so never a positive again; also when the catalogue just fills the list."""
    rng = np.random.default_rng(seed)
    num_items = num_places + num_spare
    before = rng.permuted(np.tile(np.arange(num_items), (num_lists, 1)), axis=1)[:, :num_places]
    labels = (rng.random(before.shape) < positive_frac).astype(np.float32)
    ids, new_labels = redraw_negatives(before, labels, num_items, 3, np.random.default_rng(seed))
    assert (np.diff(np.sort(ids, axis=2), axis=2) > 0).all()
    assert ((ids >= 0) & (ids < num_items)).all()
    kept = np.broadcast_to(labels > 0, ids.shape)
    assert (ids[kept] == np.broadcast_to(before, ids.shape)[kept]).all()
    assert (new_labels == labels).all()
    again, _ = redraw_negatives(before, labels, num_items, 3, np.random.default_rng(seed))
    assert (again == ids).all()


def test_redraw_is_uniform_over_sets() -> None:
    """Positive 0, two places drawn of items 1..4: each of the 6 sets in 1/6 of the draws, orders alike."""
    before, labels = np.tile([1, 0, 2], (6000, 1)), np.tile([0, 1, 0], (6000, 1))
    ids, _ = redraw_negatives(before, labels, 5, 1, np.random.default_rng(0))
    drawn = ids[0][:, [0, 2]]
    shares = np.unique(np.sort(drawn, axis=1), axis=0, return_counts=True)[1] / 6000
    np.testing.assert_allclose(shares, np.full(6, 1 / 6), atol=0.022)  # 4.5 standard deviations
    assert (drawn[:, 0] < drawn[:, 1]).mean() == pytest.approx(0.5, abs=0.03)


def test_redraw_without_weights_draws_what_it_always_drew() -> None:
    """Draws of a seed as they were before there were weights: runs with that seed stay comparable."""
    before, labels = np.array([[7, 3, 9, 0], [5, 6, 8, 2]]), np.array([[1, 0, 1, 0], [0, 0, 0, 1]])
    ids, _ = redraw_negatives(before, labels, 12, 2, np.random.default_rng(1))
    assert ids.tolist() == [[[7, 6, 9, 11], [0, 1, 9, 2]], [[7, 3, 9, 5], [3, 9, 1, 2]]]


def test_redraw_by_weight_by_hand() -> None:
    """Positive 0 (its weight does not matter), two places drawn of items 1, 2, 3 with weights 6, 3, 1.

    One after the other: {1,2} .6 * 3/4 + .3 * 6/7 = .707143; {1,3} .6 * 1/4 + .1 * 6/9 = .216667; {2,3}
    .3 * 1/7 + .1 * 3/9 = .076190. Shuffled: either item of a set comes first in half of the lists, though the
    likelier one was mostly drawn first.
    """
    before, labels = np.tile([1, 0, 2], (20_000, 1)), np.tile([0, 1, 0], (20_000, 1))
    ids, _ = redraw_negatives(before, labels, 4, 1, np.random.default_rng(0), np.array([1.0, 6, 3, 1]))
    assert (ids[0, :, 1] == 0).all()
    drawn = ids[0][:, [0, 2]]
    sets, counts = np.unique(np.sort(drawn, axis=1), axis=0, return_counts=True)
    assert sets.tolist() == [[1, 2], [1, 3], [2, 3]]
    np.testing.assert_allclose(counts / 20_000, [0.707143, 0.216667, 0.076190], atol=0.0145)
    assert (drawn[:, 0] < drawn[:, 1]).mean() == pytest.approx(0.5, abs=0.016)  # 4.5 standard deviations


def test_redraw_by_weight_ends_and_never_draws_weight_zero() -> None:
    """All weight on item 0, next to none on 1, 2, 3, none on 4: filled up uniformly, 2 of 3, so each in 2/3 of the lists."""
    weights = np.array([1.0, 1e-12, 1e-12, 1e-12, 0.0])
    ids, _ = redraw_negatives(
        np.zeros((3000, 3), int), np.zeros((3000, 3)), 5, 1, np.random.default_rng(0), weights
    )
    counts = np.bincount(ids.ravel(), minlength=5) / 3000
    assert counts[0] == 1 and counts[4] == 0
    np.testing.assert_allclose(counts[1:4], 2 / 3, atol=0.039)  # 4.5 standard deviations


@given(
    num_lists=st.integers(0, 12),
    num_places=st.integers(1, 8),
    num_spare=st.integers(0, 20),
    skew=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None)
def test_redraw_by_weight_never_repeats(
    num_lists: int, num_places: int, num_spare: int, skew: float, seed: int
) -> None:
    """However skewed, also when the weighted items just fill a list: positives stay, nothing twice."""
    rng = np.random.default_rng(seed)
    num_items = num_places + num_spare
    before = rng.permuted(np.tile(np.arange(num_items), (num_lists, 1)), axis=1)[:, :num_places]
    labels = (rng.random(before.shape) < 0.3).astype(np.float32)
    weights = rng.random(num_items) ** skew
    ids, new_labels = redraw_negatives(before, labels, num_items, 2, np.random.default_rng(seed), weights)
    assert (np.diff(np.sort(ids, axis=2), axis=2) > 0).all()
    assert ((ids >= 0) & (ids < num_items)).all()
    kept = np.broadcast_to(labels > 0, ids.shape)
    assert (ids[kept] == np.broadcast_to(before, ids.shape)[kept]).all()
    assert (new_labels == labels).all()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 1.0, 1.0], "got shape \\(3,\\)"),
        ([1.0, 1.0, -1.0, 1.0], "1 negative"),
        ([1.0, np.nan, np.inf, 1.0], "2 not finite"),
        ([1.0, 0.0, 1.0, 0.0], "only 2 of 4 items have a weight above 0"),
    ],
)
def test_weights_that_cannot_be_drawn_by(weights: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        redraw_negatives(
            np.array([[0, 1, 2]]), np.array([[1, 0, 0]]), 4, 1, np.random.default_rng(0), np.array(weights)
        )


def test_redraw_ends_when_a_logged_list_repeats_a_positive() -> None:
    """Logged lists may hold an item twice; both stay and the draw still avoids it."""
    ids, _ = redraw_negatives(np.array([[3, 3, 0]]), np.array([[1, 1, 0]]), 4, 20, np.random.default_rng(0))
    assert (ids[:, 0, :2] == 3).all()
    assert (ids[:, 0, 2] != 3).all()


def test_redraw_is_vectorised() -> None:
    """50,000 lists of 10 in CPU time a loop per list could not reach."""
    rng = np.random.default_rng(0)
    before = np.tile(np.arange(10), (50_000, 1))
    labels = (rng.random(before.shape) < 0.2).astype(np.float32)
    start = time.process_time()
    redraw_negatives(before, labels, 3000, 1, rng)
    assert time.process_time() - start < 0.8


def test_split_shares_by_hand() -> None:
    """1,000 users, test .1: 100; valid .1 of the 900 others: 90; 810 train.

    5 folds of 200, and 20 of each among the test users.
    """
    split, fold = split_users(np.arange(1000), 0.1, 0.1, 5, seed=0)
    assert dict(zip(*np.unique(split, return_counts=True), strict=True)) == {
        "train": 810,
        "valid": 90,
        "test": 100,
    }
    assert fold.dtype == np.int32
    assert np.bincount(fold).tolist() == [200] * 5
    assert np.bincount(fold[split == "test"]).tolist() == [20] * 5
    assert np.bincount(fold[split == "valid"]).tolist() == [18] * 5


@given(num_users=st.integers(3, 60), num_folds=st.integers(1, 7), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_split_is_balanced_and_keyed_by_user(num_users: int, num_folds: int, seed: int) -> None:
    """Every split has a user, folds differ by at most one, and the order of the users does not matter."""
    user_ids = np.random.default_rng(seed).permutation(1000)[:num_users]
    split, fold = split_users(user_ids, 0.1, 0.1, num_folds, seed)
    assert set(split.tolist()) == {"train", "valid", "test"}
    counts = np.bincount(fold, minlength=num_folds)
    assert counts.max() - counts.min() <= 1
    again = split_users(user_ids[::-1], 0.1, 0.1, num_folds, seed)
    assert (again[0][::-1] == split).all()
    assert (again[1][::-1] == fold).all()


def test_split_seeds_and_zero_shares() -> None:
    """Another seed, another split; a share of 0 gives no user."""
    first, _ = split_users(np.arange(200), 0.1, 0.1, 5, seed=0)
    assert (first != split_users(np.arange(200), 0.1, 0.1, 5, seed=1)[0]).any()
    assert set(split_users(np.arange(20), 0.0, 0.0, 1, seed=0)[0].tolist()) == {"train"}


def test_split_mistakes() -> None:
    with pytest.raises(UserError, match="2 users leave none for training"):
        split_users(np.arange(2), 0.1, 0.1, 2, seed=0)
    with pytest.raises(ValueError, match="twice"):
        split_users(np.array([1, 1, 2]), 0.1, 0.1, 2, seed=0)


def test_an_item_that_comes_twice_keeps_both_places_and_is_not_drawn():
    """Users 0 and 1 meet item 3 three times: within one list, and before it."""
    events = events_of([3, 1, 2, 3, 4, 3, 3, 5], [3, 3, 3, 3])
    plan = plan_lists(events.bounds, knowledge_cut(np.diff(events.bounds), 30), 4)
    assert plan.size.tolist() == [4, 2]
    for avoid_seen in (False, True):
        ids, labels = fill(events, plan, num_items=20, avoid_seen=avoid_seen)
        assert sorted(ids[0][ids[0] == 3].tolist()) == [3, 3] and (ids[1] == 3).sum() == 2
        # rated 1, 5, 4 and 3: items 4, 3, 3 and 5
        assert labels[0].sum() == 2 and labels[0][ids[0] == 3].tolist() == [1.0, 1.0]
        drawn = [ids[0][~np.isin(ids[0], [3, 4, 5])], ids[1][ids[1] != 3]]
        assert [len(set(one.tolist())) for one in drawn] == [6, 8]
        if avoid_seen:
            assert not set(drawn[0].tolist()) & {1, 2}


def test_only_distinct_items_count_as_met():
    """Ten events of two items leave eight of ten items for a list of eight; of seven items too few are left."""
    events = events_of([0, 1] * 5)
    plan = ListPlan(*(np.array([value]) for value in (0, 0, 9, 1)))
    ids, _ = fill(events, plan, num_items=9, num_candidates=8, avoid_seen=True)
    assert set(ids[0].tolist()) == {1, *range(2, 9)}
    with pytest.raises(UserError, match="a user has met all but 6"):
        fill(events, plan, num_items=8, num_candidates=8, avoid_seen=True)


def test_a_redraw_keeps_an_item_that_is_positive_twice():
    ids, labels = np.array([[3, 3, 7, 8]]), np.array([[1.0, 1.0, 0.0, 0.0]])
    redrawn, kept = redraw_negatives(ids, labels, 10, 5, np.random.default_rng(0))
    assert (redrawn[:, 0, :2] == 3).all() and (kept[:, 0, :2] == 1).all()
    assert (redrawn[:, 0, 2] != redrawn[:, 0, 3]).all() and (redrawn[:, 0, 2:] != 3).all()
