from __future__ import annotations

import time
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_ray.core.candidates import (
    CandidateList,
    build_lists,
    knowledge_cut,
    redraw_negatives,
    split_users,
)
from dpo4rec_ray.errors import UserError


def build(
    num_events: int = 11, cut: int = 4, seed: int = 0, num_items: int = 200, **changes: int
) -> list[CandidateList]:
    """A user who rates items 0, 1, 2, ... 5, 4, 3, 2, 1, 5, 4, ... at times 100, 101, ..."""
    settings_ = {"block_size": 4, "num_candidates": 10, "history_length": 5} | changes
    events = np.arange(num_events)
    return build_lists(
        events,
        (5 - events % 5).astype(np.float32),
        100 + events,
        cut,
        num_items=num_items,
        positive_rating=4,
        rng=np.random.default_rng(seed),
        **settings_,
    )


@pytest.mark.parametrize(
    ("num_events", "cap", "cut"),
    [(0, 30, 0), (1, 30, 1), (2, 30, 1), (7, 30, 4), (8, 30, 4), (59, 30, 30), (100, 30, 30)],
)
def test_knowledge_cut(num_events: int, cap: int, cut: int) -> None:
    """min((n + 1) // 2, cap): half of the events, rounded up, but at most the cap."""
    assert knowledge_cut(num_events, cap) == cut


def test_blocks_by_hand() -> None:
    """11 events, cut 4: blocks 4 5 6 7 and 8 9 10.

    Ratings 5 4 3 2 1 repeat from item 0, so 5 and 6, then 10 are >= 4. Histories are the five events before
    items 4 (only four exist) and 8; times are those of items 4 and 8.
    """
    first, second = build()
    assert (first.timestamp_s, second.timestamp_s) == (104, 108)
    assert first.history_item_ids.tolist() == [0, 1, 2, 3]
    assert first.history_ratings.tolist() == [5.0, 4.0, 3.0, 2.0]
    assert second.history_item_ids.tolist() == [3, 4, 5, 6, 7]
    assert {4, 5, 6, 7} <= set(first.candidate_item_ids.tolist())
    assert {8, 9, 10} <= set(second.candidate_item_ids.tolist())
    assert set(first.candidate_item_ids[first.labels == 1].tolist()) == {5, 6}
    assert set(second.candidate_item_ids[second.labels == 1].tolist()) == {10}


@given(
    num_events=st.integers(0, 40),
    cap=st.integers(0, 30),
    block_size=st.integers(1, 6),
    extra=st.integers(0, 6),
    num_spare=st.integers(0, 30),
    history_length=st.integers(0, 7),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=120, deadline=None)
def test_lists_never_leak_and_never_repeat(
    num_events: int, cap: int, block_size: int, extra: int, num_spare: int, history_length: int, seed: int
) -> None:
    """For any user, even one who meets items again, and any catalogue, even one that just fills a list."""
    num_candidates = block_size + extra
    num_items = num_candidates + num_spare
    rng = np.random.default_rng(seed)
    items, ratings = rng.integers(0, num_items, num_events), rng.integers(1, 6, num_events).astype(np.float32)
    times = np.arange(num_events) * 10
    cut = knowledge_cut(num_events, cap)
    lists = build_lists(
        items,
        ratings,
        times,
        cut,
        num_items=num_items,
        block_size=block_size,
        num_candidates=num_candidates,
        positive_rating=4,
        history_length=history_length,
        rng=rng,
    )
    starts = range(cut, num_events, block_size)
    assert len(lists) == len(starts)
    for start, made in zip(starts, lists, strict=True):
        before, block = slice(max(0, start - history_length), start), slice(start, start + block_size)
        assert made.timestamp_s == times[start]
        assert made.history_item_ids.tolist() == items[before].tolist()
        assert made.history_ratings.tolist() == ratings[before].tolist()
        ids = made.candidate_item_ids.tolist()
        assert len(set(ids)) == len(ids) == num_candidates
        assert all(0 <= item < num_items for item in ids)
        assert set(items[block].tolist()) <= set(ids)
        positives = {item for item, rating in zip(items[block], ratings[block], strict=True) if rating >= 4}
        assert {item for item, label in zip(ids, made.labels, strict=True) if label == 1} == positives
        assert set(made.labels.tolist()) <= {0.0, 1.0}


def test_lists_do_not_depend_on_later_events() -> None:
    """Cutting a user's events short leaves the earlier blocks' events, labels and histories as they were."""
    for short, whole in zip(build(num_events=8), build(num_events=30)[:1], strict=True):
        assert short.history_item_ids.tolist() == whole.history_item_ids.tolist()
        assert set(short.candidate_item_ids[short.labels == 1]) == set(
            whole.candidate_item_ids[whole.labels == 1]
        )


def test_seed_decides_the_lists() -> None:
    """The same generator state gives the same lists to the last place; another gives others."""
    same, again, other = build(seed=3), build(seed=3), build(seed=4)
    for left, right in zip(same, again, strict=True):
        for one, two in zip(astuple(left), astuple(right), strict=True):
            np.testing.assert_array_equal(one, two)
    assert any((a.candidate_item_ids != b.candidate_item_ids).any() for a, b in zip(same, other, strict=True))


def test_drawn_items_and_places_are_uniform() -> None:
    """4,000 lists with one event (item 0) and 3 drawn of the other 9 items.

    Each of the 9 is in 1/3 of the lists, and item 0 in each place 1/4 of the time.
    """
    lists = build_lists(
        np.zeros(4000, dtype=np.int64),
        np.full(4000, 5.0),
        np.arange(4000),
        0,
        num_items=10,
        block_size=1,
        num_candidates=4,
        positive_rating=4,
        history_length=0,
        rng=np.random.default_rng(0),
    )
    ids = np.stack([made.candidate_item_ids for made in lists])
    counts = np.bincount(ids.ravel(), minlength=10)
    assert counts[0] == 4000
    np.testing.assert_allclose(counts[1:] / 4000, 1 / 3, atol=0.035)  # 4.5 standard deviations
    np.testing.assert_allclose((ids == 0).mean(axis=0), 1 / 4, atol=0.035)


def test_no_event_after_the_cut_gives_no_list() -> None:
    assert build(num_events=4, cut=4) == []
    assert build(num_events=0, cut=0) == []


def test_impossible_sizes_are_the_users_mistake() -> None:
    with pytest.raises(UserError, match="catalogue of 9 items"):
        build(num_items=9)
    with pytest.raises(UserError, match="block_size = 11"):
        build(block_size=11)
    with pytest.raises(UserError, match="block_size = 0"):
        build(block_size=0)
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
    with pytest.raises(UserError, match=r"test_frac = 1\.0"):
        split_users(np.arange(9), 1.0, 0.1, 2, seed=0)
    with pytest.raises(UserError, match="num_folds = 0"):
        split_users(np.arange(9), 0.1, 0.1, 0, seed=0)
    with pytest.raises(ValueError, match="twice"):
        split_users(np.array([1, 1, 2]), 0.1, 0.1, 2, seed=0)
