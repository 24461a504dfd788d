"""The sample world: deterministic by seed, training users from their own stream, tastes that matter."""

from __future__ import annotations

import numpy as np
import pytest

from dpo4rec_ray.config.data import SampleSection
from dpo4rec_ray.datasets.source import EVENTS, ITEMS
from dpo4rec_ray.datasets.synthetic import (
    describe,
    facet_values,
    make_catalogue,
    simulate_users,
)
from dpo4rec_ray.errors import UserError

CATALOGUE = make_catalogue(120, seed=7)


def _users(seed: int, stream: str = "run", num_users: int = 40):
    return simulate_users(CATALOGUE.attributes, CATALOGUE.popularity, num_users, seed, stream=stream)


def _matches(
    tastes: list[list[str]], user_index: np.ndarray, item_index: np.ndarray, attributes: list[list[str]]
):
    return np.array(
        [len(set(tastes[u]) & set(attributes[i])) for u, i in zip(user_index, item_index, strict=True)]
    )


def test_catalogue_is_deterministic_and_its_titles_are_distinct():
    again = make_catalogue(120, seed=7)
    assert again.titles == CATALOGUE.titles and again.attributes == CATALOGUE.attributes
    assert np.array_equal(again.popularity, CATALOGUE.popularity)
    assert make_catalogue(120, seed=8).titles != CATALOGUE.titles
    assert len(set(CATALOGUE.titles)) == 120
    assert {len(values) for values in facet_values(CATALOGUE.attributes).values()} == {8, 5, 14}


def test_users_are_deterministic_and_the_streams_are_disjoint():
    first, again = _users(3), _users(3)
    assert first.tastes == again.tastes
    assert np.array_equal(first.item_index, again.item_index) and np.array_equal(first.rating, again.rating)
    histories = {
        (stream, seed): {
            tuple(users.item_index[users.user_index == u].tolist()) for u in range(len(users.tastes))
        }
        for stream in ("run", "bootstrap")
        for seed in (3, 4)
        for users in [_users(seed, stream)]
    }
    keys = list(histories)
    for i, key in enumerate(keys):
        for other in keys[i + 1 :]:
            assert not histories[key] & histories[other], f"{key} and {other} share a user"


def test_events_are_in_time_order_without_repeats_and_within_bounds():
    users = _users(0)
    for user in range(40):
        mine = users.user_index == user
        assert 24 <= mine.sum() <= 36
        assert (np.diff(users.timestamp_s[mine]) > 0).all()
        assert len(set(users.item_index[mine].tolist())) == mine.sum()
    assert np.isin(users.rating, [1, 2, 3, 4, 5]).all()


def test_taste_decides_what_is_met_and_how_it_is_rated():
    users = _users(0, num_users=100)
    matches = _matches(users.tastes, users.user_index, users.item_index, CATALOGUE.attributes)
    others = _matches(
        users.tastes[1:] + users.tastes[:1], users.user_index, users.item_index, CATALOGUE.attributes
    )
    assert matches.mean() > others.mean() + 0.5
    assert users.rating[matches >= 2].mean() > users.rating[matches == 0].mean() + 1.0


def test_simulated_users_work_over_a_catalogue_with_several_genres_and_no_creator():
    attributes = [
        ["genre: Comedy", "genre: Drama", "era: 1990s"],
        ["genre: Sci-Fi", "era: 1980s"],
        ["genre: Drama"],
    ] * 20
    users = simulate_users(attributes, np.full(60, 1 / 60), 5, 0, stream="bootstrap")
    assert {taste.split(": ")[0] for tastes in users.tastes for taste in tastes} == {"genre", "era"}
    assert len(users.tastes) == 5 and set(users.user_index.tolist()) == set(range(5))


def test_the_source_holds_tables_that_agree_and_a_catalogue_that_the_seed_does_not_change():
    settings = SampleSection(num_users=30, num_items=60)
    one, other = describe(settings, seed=1), describe(settings, seed=2)
    items, events, truth = one.items[0].table, one.events[0].table, one.truth
    assert items.equals(other.items[0].table) and not truth.equals(other.truth)
    assert len(items) == 60 and len(truth) == 30
    assert events.schema == EVENTS and items.schema == ITEMS
    assert set(events["item"].to_pylist()) <= set(items["raw_id"].to_pylist())
    assert set(events["user"].to_pylist()) == set(truth["raw_id"].to_pylist())


@pytest.mark.parametrize("num_items", [5, 100_000])
def test_a_catalogue_that_cannot_be_made_is_a_user_error(num_items: int):
    with pytest.raises(UserError, match="num_items"):
        make_catalogue(num_items, seed=0)


def test_too_few_items_or_an_unknown_stream_is_a_user_error():
    with pytest.raises(UserError, match="too few"):
        simulate_users([["genre: drama"]] * 10, np.ones(10), 2, 0)
    with pytest.raises(UserError, match="unknown"):
        _users(0, stream="test")
