"""A small catalogue with knowledge vectors, and lists whose labels follow user vector . item vector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dpo4rec_ray.rerankers.catalogue import Catalogue
from dpo4rec_ray.rerankers.fit import ListData
from tests.unit.rerankers.builders import make_lists


@dataclass(frozen=True)
class World:
    """Lists of ten candidates; user u's row in `user_vectors` is u."""

    catalogue: Catalogue
    user_vectors: np.ndarray  # [U, D] float32
    train: ListData
    valid: ListData


def make_world(
    num_lists: int, num_users: int = 200, num_items: int = 120, dim: int = 48, seed: int = 0
) -> World:
    """As with sentence vectors, all share a strong mean, so raw cosines sit in a narrow band near one."""
    rng = np.random.default_rng(seed)
    mean = 2.0 * rng.normal(size=dim)
    tastes, traits = rng.normal(size=(num_users, dim)), rng.normal(size=(num_items, dim))
    attributes = [[f"genre: {i % 5}", f"genre: {i % 3}", f"era: {i % 4}"] for i in range(num_items)]
    attributes[0] = []  # an item without attributes
    catalogue = Catalogue.from_items(attributes, (mean + traits).astype(np.float32))
    users = rng.integers(0, num_users, num_lists)
    item_ids = rng.random((num_lists, num_items)).argsort(axis=1)[:, :10]
    match = np.einsum("nd,nld->nl", tastes[users], traits[item_ids]) / np.sqrt(dim)
    labels = (match + 0.5 * rng.normal(size=match.shape) > 0.8).astype(np.float32)
    lists = make_lists(item_ids.tolist(), labels.tolist(), users.tolist())
    held_out = lists.user_ids % 5 == 0
    return World(
        catalogue, (mean + tastes).astype(np.float32), lists.select(~held_out), lists.select(held_out)
    )


@pytest.fixture(autouse=True)
def one_thread():
    """The machine is shared, and one thread makes float sums reproducible."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def planted() -> World:
    """2,000 lists: enough to use the similarity, too few for the adapter alone."""
    return make_world(2000)


@pytest.fixture(scope="session")
def small() -> World:
    return make_world(120, num_users=20)
