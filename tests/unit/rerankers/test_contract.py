"""What every backbone in RERANKERS must do, with and without knowledge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo4rec_ray.core.losses import RANKING_LOSSES
from dpo4rec_ray.core.metrics import metric_by_name
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers import RERANKERS, Catalogue, RerankerSettings, build_reranker
from dpo4rec_ray.rerankers.fit import load_reranker, save_reranker

pytestmark = pytest.mark.parametrize("name", sorted(RERANKERS))
knowledge_on_off = pytest.mark.parametrize("knowledge", [False, True])


def build(name, world, knowledge=True, **settings):
    return build_reranker(name, world.catalogue.shape, knowledge, RerankerSettings(**settings), seed=3).eval()


def batch_of(world, num_lists=6, knowledge=True, mask=None):
    vectors = torch.from_numpy(world.user_vectors) if knowledge else None
    lists = world.train
    return world.catalogue.batch(lists.item_ids[:num_lists], mask, vectors, lists.user_rows[:num_lists])


@knowledge_on_off
def test_scores_have_one_finite_value_per_candidate(name, knowledge, small):
    scores = build(name, small, knowledge)(batch_of(small, knowledge=knowledge))
    assert scores.shape == (6, 10)
    assert scores.isfinite().all() and scores.std() > 0


@knowledge_on_off
def test_padding_changes_no_score(name, knowledge, small):
    model = build(name, small, knowledge)
    vectors = torch.from_numpy(small.user_vectors) if knowledge else None
    ids, rows = small.train.item_ids[:4, :5], small.train.user_rows[:4]
    bare = model(small.catalogue.batch(ids, None, vectors, rows))
    for filler in (0, 17):
        padded_ids = torch.cat([ids, torch.full((4, 3), filler)], dim=1)
        mask = torch.tensor([[True] * 5 + [False] * 3]).expand(4, -1)
        padded = model(small.catalogue.batch(padded_ids, mask, vectors, rows))
        torch.testing.assert_close(padded[:, :5], bare, rtol=1e-4, atol=1e-5)


@knowledge_on_off
def test_masked_places_never_win(name, knowledge, small):
    model = build(name, small, knowledge)
    mask = torch.ones(6, 10, dtype=torch.bool)
    mask[0, 2:] = False
    mask[1, ::2] = False
    mask[2] = False  # a list of nothing but padding
    batch = batch_of(small, knowledge=knowledge, mask=mask)
    assert model(batch).isfinite().all()
    scores = model.score(batch)
    assert torch.equal(scores == float("-inf"), ~mask)
    assert mask[0, scores[0].argmax()] and mask[1, scores[1].argmax()]
    # Only padding is relevant: no ranking of the real candidates can earn anything.
    labels = (~mask).float().numpy()
    assert np.all(metric_by_name("ndcg@5")(scores.detach().numpy(), labels, mask.numpy()) == 0)


@knowledge_on_off
def test_lists_do_not_see_each_other(name, knowledge, small):
    model = build(name, small, knowledge)
    together = model(batch_of(small, num_lists=6, knowledge=knowledge))
    alone = model(batch_of(small, num_lists=1, knowledge=knowledge))
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


@knowledge_on_off
def test_every_parameter_is_trained(name, knowledge, small):
    """DistributedDataParallel waits for the gradient of every parameter."""
    model = build(name, small, knowledge)
    lists = small.train
    scores = model(batch_of(small, num_lists=len(lists), knowledge=knowledge))
    RANKING_LOSSES[model.loss](scores, lists.labels, lists.mask).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_knowledge_is_used_only_when_asked(name, small):
    with_vectors, without = batch_of(small), batch_of(small, knowledge=False)
    plain = build(name, small, knowledge=False)
    assert torch.equal(plain(with_vectors), plain(without))
    knowing = build(name, small, knowledge=True)
    other = replace(with_vectors, user_vectors=with_vectors.user_vectors.flip(0))
    assert not torch.allclose(knowing(with_vectors), knowing(other))
    with pytest.raises(UserError, match="user_vectors"):
        knowing(without)


def test_similarity_changes_scores_unless_off(name, small):
    batch = batch_of(small)
    changed = replace(batch, similarity=batch.similarity.flip(1))
    on, off = build(name, small), build(name, small, similarity=False)
    assert not torch.allclose(on(batch), on(changed), atol=1e-3)
    assert torch.equal(off(batch), off(changed))


@knowledge_on_off
def test_save_and_load_give_equal_scores(name, knowledge, small, tmp_path):
    model, batch = build(name, small, knowledge), batch_of(small)
    save_reranker(tmp_path, model, {"fold": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "reranker.json"]
    assert torch.equal(load_reranker(tmp_path, small.catalogue)(batch), model(batch))


def test_load_refuses_another_catalogue(name, small, tmp_path):
    save_reranker(tmp_path, build(name, small), {})
    vectors = small.catalogue.item_vectors
    renamed = Catalogue.from_items([["genre: x"]] * len(vectors), vectors)
    with pytest.raises(UserError, match="trained on"):
        load_reranker(tmp_path, renamed)
    with pytest.raises(UserError, match=r"reranker\.json"):
        load_reranker(tmp_path / "nothing", small.catalogue)


def test_same_seed_same_weights_and_global_generator_untouched(name, small):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second = build(name, small).state_dict(), build(name, small).state_dict()
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_unknown_names_list_the_known(name, small):
    with pytest.raises(UserError, match=name):
        build_reranker("prmm", small.catalogue.shape, False)
    with pytest.raises(UserError, match="hea"):
        build(name, small, adapter="heaa")
    without_vectors = Catalogue.from_items([["genre: x"]]).shape
    with pytest.raises(UserError, match="item vectors"):
        build_reranker(name, without_vectors, True)
