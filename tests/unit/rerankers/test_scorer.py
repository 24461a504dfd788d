from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
import torch

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers import RERANKERS, scorer
from dpo4rec_ray.rerankers.scorer import ListScorer
from tests.unit.rerankers.builders import WAYS, build, with_full_branch

every_backbone = pytest.mark.parametrize("name", sorted(RERANKERS))


def reference(model, world, ids, mask, rows):
    users = torch.from_numpy(world.user_vectors)
    with torch.no_grad():
        return model.eval().score(world.catalogue.batch(ids, mask, users, rows)).numpy()


@every_backbone
@pytest.mark.parametrize(("knowledge", "way"), [(False, "input"), *((True, way) for way in WAYS)])
def test_equals_forward_over_chunks(name, knowledge, way, small, monkeypatch):
    monkeypatch.setattr(scorer, "PLACES_PER_CHUNK", 70)  # 7 lists: several chunks and a short last one
    monkeypatch.setattr(scorer, "USERS_PER_CHUNK", 3)
    model = with_full_branch(build(name, small.catalogue.shape, knowledge, way=way))
    lists = small.train
    mask = torch.rand(lists.mask.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    for chosen in (None, mask):
        found = ListScorer([model], small.catalogue).score(
            lists.item_ids, chosen, small.user_vectors, lists.user_rows
        )
        expected = reference(model, small, lists.item_ids, chosen, lists.user_rows)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_numpy_in_and_one_vector_per_list(small):
    score = ListScorer([build("prm", small.catalogue.shape, True)], small.catalogue).score
    lists = small.train
    by_rows = score(lists.item_ids.numpy(), lists.mask.numpy(), small.user_vectors, lists.user_rows.numpy())
    per_list = score(lists.item_ids, None, small.user_vectors[lists.user_rows])
    np.testing.assert_allclose(by_rows, per_list, rtol=1e-4, atol=1e-5)
    assert score(lists.item_ids[:0], None, small.user_vectors, lists.user_rows[:0]).shape == (0, 10)


def test_read_only_arrays_are_taken_without_a_warning(small):
    """As those of Arrow columns, mapped files and Ray's object store are."""
    lists = small.train
    arrays = [lists.item_ids.numpy(), lists.mask.numpy(), small.user_vectors, lists.user_rows.numpy()]
    read_only = [array.copy() for array in arrays]
    for array in read_only:
        array.setflags(write=False)
    score = ListScorer([build("prm", small.catalogue.shape, True)], small.catalogue).score
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score(*read_only)
    np.testing.assert_array_equal(found, score(*arrays))


def test_mean_over_models(small):
    """With and without knowledge, and of each way that it may enter."""
    models = [
        with_full_branch(build("prm", small.catalogue.shape, True, way=way, seed=s))
        for s, way in enumerate(WAYS)
    ]
    models.append(build("prm", small.catalogue.shape, False, seed=9))
    lists = small.train
    arguments = (lists.item_ids, lists.mask, small.user_vectors, lists.user_rows)
    each = [ListScorer([model], small.catalogue).score(*arguments) for model in models]
    np.testing.assert_allclose(
        ListScorer(models, small.catalogue).score(*arguments), np.mean(each, axis=0), atol=1e-5
    )


def test_mistakes_are_named(small):
    score = ListScorer([build("prm", small.catalogue.shape, True)], small.catalogue).score
    ids = small.train.item_ids[:3]
    with pytest.raises(UserError, match="pass user_vectors"):
        score(ids)
    with pytest.raises(UserError, match="3 lists"):
        score(ids, None, small.user_vectors[:2])
    with pytest.raises(UserError, match="3 lists"):
        score(ids, None, small.user_vectors, [0, 1, 99])
    with pytest.raises(UserError, match="item_id 500"):
        score(torch.full((1, 2), 500), None, small.user_vectors[:1])
    with pytest.raises(UserError, match="at least one"):
        ListScorer([], small.catalogue)


def test_fast_enough(small):
    """About 40,000 lists per CPU second on the reference machine; the bound only catches a slow path."""
    score = ListScorer([build("prm", small.catalogue.shape, True)], small.catalogue).score
    rng = np.random.default_rng(0)
    ids = rng.integers(0, small.catalogue.shape.num_items, (8000, 10))
    rows = np.repeat(np.arange(20), 400)
    score(ids[:512], None, small.user_vectors, rows[:512])
    began = time.process_time()
    score(ids, None, small.user_vectors, rows)
    assert 8000 / (time.process_time() - began) > 8000
