from __future__ import annotations

import numpy as np
import pytest
import torch

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers import catalogue
from dpo4rec_ray.rerankers.catalogue import Catalogue


def test_attribute_ids_by_hand():
    """Facets and values in alphabetical order, values from 1, 0 = missing, the first genre counts."""
    items = [["genre: Drama", "genre: Comedy", "era: 1990s"], ["genre: Action"], [], ["era: 1980s"]]
    built = Catalogue.from_items(items)
    assert built.shape.facet_sizes == (3, 3)  # 1980s, 1990s and Action, Drama, each with the missing value
    assert built.attribute_ids.tolist() == [[2, 2], [0, 1], [0, 0], [1, 0]]
    assert built.shape.vector_dim == 0 and built.item_vectors is None
    assert Catalogue.from_items([[], []]).attribute_ids.shape == (2, 0)


def test_similarity_is_the_cosine_standardised_over_the_catalogue(small):
    """z[u, i] = (cos(u, i) - mean_i cos) / std_i cos, computed from the definition."""
    items, users = small.catalogue.item_vectors.double().numpy(), small.user_vectors.astype(np.float64)
    cosine = (users / np.linalg.norm(users, axis=1, keepdims=True)) @ (
        items / np.linalg.norm(items, axis=1, keepdims=True)
    ).T
    expected = (cosine - cosine.mean(1, keepdims=True)) / cosine.std(1, keepdims=True)
    lists = small.train
    batch = small.catalogue.batch(lists.item_ids, None, torch.from_numpy(small.user_vectors), lists.user_rows)
    rows, ids = lists.user_rows.numpy(), lists.item_ids.numpy()
    np.testing.assert_allclose(batch.similarity.numpy(), expected[rows[:, None], ids], atol=2e-4)


def test_a_missing_vector_is_neutral(small):
    vectors = small.catalogue.item_vectors.clone()
    vectors[3] = 0
    attributes = [["genre: x"]] * len(vectors)
    users = torch.from_numpy(small.user_vectors[:2]).clone()
    users[1] = 0
    similarity = (
        Catalogue.from_items(attributes, vectors)
        .batch(torch.tensor([[3, 4], [3, 4]]), None, users)
        .similarity
    )
    assert similarity[0, 0] == 0 and similarity[0, 1] != 0  # the item without a text
    assert torch.equal(similarity[1], torch.zeros(2))  # the user without a text


def test_batch_holds_distinct_items_and_users_once(small):
    ids = torch.tensor([[5, 2, 5], [2, 9, 9]])
    batch = small.catalogue.batch(ids, None, torch.from_numpy(small.user_vectors), torch.tensor([7, 7]))
    assert batch.item_ids.tolist() == [2, 5, 9]
    assert torch.equal(batch.item_ids[batch.index], ids)
    assert len(batch.user_vectors) == 1 and batch.user_rows.tolist() == [0, 0]


@pytest.mark.parametrize("read_cost", [0, 10**9])
def test_both_ways_of_the_dot_product_agree(read_cost, monkeypatch):
    monkeypatch.setattr(catalogue, "READ_COST", read_cost)
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(4, 6)), rng.normal(size=(7, 6))
    rows, index = rng.integers(0, 4, 5), rng.integers(0, 7, (5, 3))
    found = catalogue.dot_places(*map(torch.from_numpy, (users, rows, items, index)))
    np.testing.assert_allclose(found.numpy(), (users[rows][:, None] * items[index]).sum(-1))


def test_mistakes_are_named(small):
    with pytest.raises(UserError, match="'Drama' of item_id 0"):
        Catalogue.from_items([["Drama"]])
    with pytest.raises(UserError, match="1 items"):
        Catalogue.from_items([[]], np.zeros((2, 4), np.float32))
    with pytest.raises(UserError, match="same text encoder"):
        small.catalogue.batch(torch.zeros(1, 2, dtype=torch.long), None, torch.zeros(1, 5))
    with pytest.raises(UserError, match="item_id 120"):
        small.catalogue.check_ids(torch.tensor([[0, 120]]))
    with pytest.raises(UserError, match="item_id -1"):
        small.catalogue.check_ids(torch.tensor([[0, -1]]))
