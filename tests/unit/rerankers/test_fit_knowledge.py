"""Backbone first, then a branch that validation has to want: what texts may add, and that they cannot do harm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from dpo4rec_ray.config.ranking import FitSection, RerankerArchitecture
from dpo4rec_ray.core.intervals import clustered_std_error
from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.rerankers import RERANKERS, build_reranker
from dpo4rec_ray.rerankers.branches import BRANCHES
from dpo4rec_ray.rerankers.fit import fit
from dpo4rec_ray.rerankers.fit_knowledge import BELIEVED_AT, fit_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer

SHORT = FitSection(epochs=2, batch_size=64, resample_negatives=False)
every_way = pytest.mark.parametrize("way", BRANCHES)


def fitted(world, way, vectors, section=SHORT, *, name="prm", seed=0, settings=None, **arguments):
    architecture = RerankerArchitecture(backbone=name, knowledge=way, **(settings or {}))
    return fit_reranker(
        architecture, world.catalogue, world.train, world.valid, vectors, section, seed=seed, **arguments
    )


def valid_scores(model, world, vectors=None) -> np.ndarray:
    lists = world.valid
    return ListScorer([model], world.catalogue).score(lists.item_ids, lists.mask, vectors, lists.user_rows)


def valid_ndcg(model, world, vectors=None) -> np.ndarray:
    """[n] of the validation lists."""
    labels, mask = world.valid.labels.numpy(), world.valid.mask.numpy()
    return list_metrics(valid_scores(model, world, vectors), labels, ["ndcg@5"], mask)["ndcg@5"]


def others(world, seed=0) -> np.ndarray:
    """Vectors that say nothing about a user: the same ones, dealt at random."""
    return np.random.default_rng(seed).permutation(world.user_vectors)


@pytest.fixture(scope="module")
def backbone(planted):
    """A fitted backbone, and the planted world without most of its lists: a fit takes a second."""
    world = replace(planted, train=planted.train.select(slice(800)))
    return world, fitted(world, "regression", None).model


@pytest.mark.parametrize("settings", [{}, {"similarity": False}], ids=["similarity", "map alone"])
def test_texts_that_decide_what_is_liked_bring_a_gain(backbone, settings):
    """The validation users' texts were never seen; without the similarity the map alone has to carry over."""
    world, plain = backbone
    found = fitted(world, "regression", world.user_vectors, settings=settings, backbone=plain)
    gain = found.gain
    assert gain.kept and gain.with_texts > gain.without + 0.05
    assert found.result.best_value == gain.with_texts
    before, after = valid_ndcg(plain, world), valid_ndcg(found.model, world, world.user_vectors)
    assert gain.without == pytest.approx(before.mean()) and gain.with_texts == pytest.approx(after.mean())
    assert gain.std_error == pytest.approx(clustered_std_error(after - before, world.valid.user_ids.numpy()))
    assert gain.evidence > BELIEVED_AT
    assert (
        0 < gain.std_error < gain.with_texts - gain.without
    )  # what the stage train_reward prints as the channel's
    if not settings.get("similarity", True):
        assert found.model.branch.gates[1] == 0


def test_a_residual_branch_learns_what_texts_decide(backbone):
    world, plain = backbone
    section = SHORT.model_copy(update={"epochs": 4, "lr": 5e-3})
    found = fitted(world, "residual", world.user_vectors, section, backbone=plain)
    assert found.gain.kept and found.gain.with_texts > found.gain.without + 0.05
    history = found.result.history
    assert found.result.best_value == max(record["valid"] for record in history)
    assert history[found.result.best_epoch - 1]["valid"] == found.result.best_value


@every_way
@pytest.mark.parametrize("seed", range(3))
def test_texts_that_say_nothing_leave_the_backbone_or_are_believed(way, seed, backbone):
    world, plain = backbone
    vectors = others(world, seed)
    found = fitted(world, way, vectors, backbone=plain, seed=seed)
    difference = valid_ndcg(found.model, world, vectors) - valid_ndcg(plain, world)
    assert found.result.best_value >= found.gain.without
    if found.gain.kept:
        assert difference.mean() > 0 and found.gain.evidence > BELIEVED_AT
    else:
        assert np.array_equal(valid_scores(found.model, world, vectors), valid_scores(plain, world))


@every_way
def test_texts_that_do_harm_are_erased(way, backbone):
    """Training users' texts say the opposite of what the validation users' mean."""
    world, plain = backbone
    vectors = torch.from_numpy(world.user_vectors).clone()
    mean = vectors.mean(dim=0)
    held_out = world.valid.user_ids.unique()
    vectors[held_out] = 2 * mean - vectors[held_out]
    section = SHORT.model_copy(update={"epochs": 2, "lr": 2e-2})
    settings = {"similarity": False}  # which has no training users to be misled by
    found = fitted(world, way, vectors, section, settings=settings, backbone=plain)
    assert not found.gain.kept and found.result.best_value == found.gain.without
    assert np.array_equal(valid_scores(found.model, world, vectors), valid_scores(plain, world))


@pytest.mark.parametrize("name", sorted(RERANKERS))
@every_way
def test_a_backbone_that_is_given_is_not_changed(way, name, small):
    """Nor is it in the reranker with the branch, statistics of norms included; it is a copy."""
    plain = fitted(small, way, None, SHORT, name=name).model
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    found = fitted(small, way, small.user_vectors, SHORT, name=name, backbone=plain).model
    inside = found.state_dict()
    assert set(inside) > set(before) and all(torch.equal(inside[key], before[key]) for key in before)
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    assert (
        inside["embedding.item_embedding.weight"].data_ptr()
        != plain.embedding.item_embedding.weight.data_ptr()
    )


@every_way
def test_a_backbone_is_fitted_first_where_none_is_given(way, small):
    """The same as the one that is fitted by itself, and the epochs of both are in the history."""
    plain = fitted(small, way, None)
    records = []
    found = fitted(small, way, small.user_vectors, on_epoch=records.append)
    given = fitted(small, way, small.user_vectors, backbone=plain.model)
    inside = found.model.state_dict()
    assert all(torch.equal(inside[key], value) for key, value in plain.model.state_dict().items())
    assert all(torch.equal(inside[key], value) for key, value in given.model.state_dict().items())
    assert records == found.result.history
    assert [record["epoch"] for record in records] == [1, 2] * (1 + (way == "residual"))
    assert [r["valid"] for r in records[:2]] == [r["valid"] for r in plain.result.history]
    assert len(given.result.history) == 2 * (way == "residual")


@pytest.mark.parametrize(("way", "knowledge"), [("regression", False), ("input", False), ("input", True)])
def test_without_knowledge_and_in_the_input_layer_it_is_fit(way, knowledge, small):
    vectors = small.user_vectors if knowledge else None
    found = fitted(small, way, vectors, seed=4)
    architecture = RerankerArchitecture(knowledge=way)
    model = build_reranker(architecture, small.catalogue.shape, knowledge, seed=4)
    result = fit(model, small.catalogue, small.train, small.valid, vectors, SHORT, seed=4)
    assert found.gain is None and found.result.best_value == result.best_value
    weights = found.model.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_the_map_reads_all_texts_of_a_user_and_ranks_with_the_first(backbone):
    """The second texts of the validation users are noise, which changes nothing; those of training users are read."""
    world, plain = backbone
    one = torch.from_numpy(world.user_vectors)
    noise = torch.from_numpy(others(world))
    held_out = world.valid.user_ids.unique()
    misleading = one.clone()
    misleading[held_out] = noise[held_out]
    for second, equal in ((misleading, True), (noise, False)):
        vectors = torch.stack([one, second], dim=1)
        found = fitted(world, "regression", vectors, backbone=plain)
        expected = fitted(world, "regression", one, backbone=plain)
        same = torch.allclose(found.model.branch.mean, expected.model.branch.mean, atol=1e-7)
        assert same == equal
        if equal:
            assert found.gain.with_texts == pytest.approx(expected.gain.with_texts)


def test_a_share_trains_the_network_and_all_lists_make_the_map(backbone):
    """As on one rank of several: the likes of all training users are in the map."""
    world, plain = backbone
    share = slice(0, None, 2)
    whole = fitted(world, "regression", world.user_vectors, backbone=plain)
    half = fitted(world, "regression", world.user_vectors, backbone=plain, share=share)
    assert torch.equal(whole.model.branch.text_map, half.model.branch.text_map)
    alone = replace(world, train=world.train.select(share))
    expected, found = fitted(alone, "regression", None), fitted(world, "regression", None, share=share)
    assert found.result.best_value == expected.result.best_value


@pytest.mark.usefixtures("one_process")
@every_way
def test_data_parallel_of_one_rank_equals_no_wrapper(way, small):
    """`place` wraps each model that is trained; what comes back is bare."""
    found = fitted(small, way, small.user_vectors, place=DistributedDataParallel)
    expected = fitted(small, way, small.user_vectors)
    assert type(found.model) is type(expected.model)
    weights = found.model.state_dict()
    for key, value in expected.model.state_dict().items():
        torch.testing.assert_close(weights[key], value)


def test_one_validation_user_shows_nothing(backbone):
    """Without a second user there is no standard error, so no gain is believed."""
    world, plain = backbone
    alone = replace(world, valid=world.valid.select(world.valid.user_ids == world.valid.user_ids[0]))
    found = fitted(alone, "regression", world.user_vectors, backbone=plain)
    assert not found.gain.kept
