from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from dpo4rec_ray.core.losses import pointwise_bce
from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.rerankers.base import ListHistory
from dpo4rec_ray.rerankers.catalogue import Catalogue, Histories
from tests.unit.rerankers.builders import build, inputs_of


@pytest.fixture
def lists(small):
    """A model, four lists with knowledge, and a full history of five items for each."""
    model = build("mir", small.catalogue.shape, True, seed=3).eval()
    train = small.train.select(slice(4))
    vectors = torch.from_numpy(small.user_vectors)
    batch = partial(small.catalogue.batch, train.item_ids, None, vectors, train.user_rows)
    return model, batch, small.train.item_ids[10:14, :5], torch.tensor([[5.0, 1, 4, 2, 3]] * 4)


def test_history_enters_the_tables_once(lists, small):
    _, batch, seen, stars = lists
    full = batch(Histories(seen, None, stars))
    assert torch.equal(full.item_ids[full.histories.item_ids], seen)
    assert torch.equal(full.item_ids[full.index], batch().item_ids[batch().index])
    assert torch.equal(full.attribute_ids, small.catalogue.attribute_ids[full.item_ids])
    assert torch.equal(full.item_vectors, small.catalogue.item_vectors[full.item_ids])
    assert len(full.item_ids) == len(batch().item_ids) + len(seen.unique())


def test_no_history_equals_an_empty_one(lists, small):
    model, batch, seen, stars = lists
    expected = model(batch())
    empty = batch(Histories(seen, torch.zeros_like(seen, dtype=torch.bool), stars))
    torch.testing.assert_close(model(empty), expected, rtol=1e-5, atol=1e-6)
    no_places = batch(Histories(seen[:, :0], None, stars[:, :0]))
    torch.testing.assert_close(model(no_places), expected, rtol=1e-5, atol=1e-6)


def test_padding_of_the_history_changes_no_score(lists, small):
    model, batch, seen, stars = lists
    expected = model(batch(Histories(seen, None, stars)))
    for places in ([0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [0, 2, 4, 5, 7]):  # padding after, before and between
        ids, ratings = torch.full((4, 8), 17), torch.full((4, 8), 5.0)
        mask = torch.zeros(4, 8, dtype=torch.bool)
        ids[:, places], ratings[:, places], mask[:, places] = seen, stars, True
        found = model(batch(Histories(ids, mask, ratings)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_items_order_and_ratings_of_the_history_count(lists, small):
    model, batch, seen, stars = lists
    before = model(batch(Histories(seen, None, stars)))
    others = {
        "items": (seen.flip(0), stars),
        "order": (seen.flip(1), stars.flip(1)),
        "ratings": (seen, stars.flip(1)),
        "unknown ratings": (seen, None),
        "none": (seen[:, :0], None),
    }
    for what, (ids, ratings) in others.items():
        after = model(batch(Histories(ids, None, ratings)))
        assert (after - before).abs().max() > 1e-4, what
    # Ratings off the scale of five stars are the nearest star.
    wild = model(batch(Histories(seen, None, stars * 0 + 100)))
    torch.testing.assert_close(wild, model(batch(Histories(seen, None, stars * 0 + 5))), rtol=0, atol=0)


def test_rank_takes_what_a_scorer_has_gathered(lists, small):
    """The scorer holds the item part of the whole catalogue, and reads histories from it."""
    model, batch, seen, stars = lists
    expected = model(batch(Histories(seen, None, stars)))
    items = torch.arange(small.catalogue.shape.num_items)
    table = model.embedding.item_side(items, small.catalogue.attribute_ids, small.catalogue.item_vectors)
    found = model.rank(inputs_of(model.embedding, batch()), None, ListHistory(table[seen], None, stars))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_learns_what_only_the_history_tells():
    """A candidate is liked if the user gave its genre five stars; half of the history got one star."""
    rng = np.random.default_rng(0)
    genres = rng.integers(0, 4, 60)
    catalogue = Catalogue.from_items([[f"genre: {genre}"] for genre in genres])
    num_lists, places = 800, torch.arange(800)
    ids = rng.integers(0, 60, (num_lists, 10))
    seen = rng.integers(0, 60, (num_lists, 4))
    liked = rng.random((num_lists, 4)) < 0.5
    labels = ((genres[ids][:, :, None] == genres[seen][:, None, :]) & liked[:, None, :]).any(2)
    labels = torch.from_numpy(labels).float()
    ids, seen = torch.from_numpy(ids), torch.from_numpy(seen)
    stars = torch.from_numpy(np.where(liked, 5.0, 1.0))
    train, valid = places[:600], places[600:]

    def batch(rows, histories):
        return catalogue.batch(
            ids[rows], histories=Histories(seen[rows], None, stars[rows]) if histories else None
        )

    ndcg = {}
    for histories in (True, False):
        model = build("mir", catalogue.shape, False)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for epoch in range(12):
            for rows in train[torch.randperm(600, generator=torch.Generator().manual_seed(epoch))].split(60):
                loss = pointwise_bce(model(batch(rows, histories)), labels[rows], torch.ones(60, 10) > 0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            scores = model(batch(valid, histories)).numpy()
        ndcg[histories] = list_metrics(scores, labels[valid].numpy(), ["ndcg@5"])["ndcg@5"].mean()
    assert ndcg[True] > ndcg[False] + 0.3, ndcg


def test_history_fields_are_optional(lists):
    """A batch that was made for another backbone, and one whose history was dropped."""
    model, batch, *_ = lists
    assert model(batch()).isfinite().all()
    assert model(replace(batch(), mask=torch.zeros(4, 10, dtype=torch.bool))).isfinite().all()
