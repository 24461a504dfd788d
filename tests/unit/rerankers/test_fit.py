from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from dpo4rec_ray.config.ranking import FitSection
from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers.fit import fit
from dpo4rec_ray.rerankers.scorer import ListScorer
from tests.unit.rerankers.builders import build, make_lists

SHORT = FitSection(epochs=3, batch_size=32, resample_negatives=False)


def trained(world, section=SHORT, knowledge=True, wrap=lambda model: model, seed=0, **architecture):
    model = build("prm", world.catalogue.shape, knowledge, **architecture)
    vectors = world.user_vectors if knowledge else None
    result = fit(wrap(model), world.catalogue, world.train, world.valid, vectors, section, seed=seed)
    return model, result


def valid_ndcg(model, world) -> float:
    lists = world.valid
    scores = ListScorer([model], world.catalogue).score(
        lists.item_ids, lists.mask, world.user_vectors, lists.user_rows
    )
    return float(list_metrics(scores, lists.labels.numpy(), ["ndcg@5"], lists.mask.numpy())["ndcg@5"].mean())


def test_planted_signal_is_learned_through_the_similarity(planted):
    """Held-out users; labels follow user vector . item vector. Same budget for all three."""
    budget = FitSection(epochs=8, batch_size=128, resample_negatives=False)
    ndcg = {
        "none": trained(planted, budget, knowledge=False)[1].best_value,
        "adapter": trained(planted, budget, similarity=False)[1].best_value,
        "similarity": trained(planted, budget)[1].best_value,
    }
    assert ndcg["similarity"] > ndcg["none"] + 0.15
    assert ndcg["similarity"] > ndcg["adapter"] + 0.10


def test_similarity_is_used_within_two_epochs(planted):
    """No plateau: the cosine reaches the head at a usable scale from the start."""
    _, result = trained(planted, FitSection(epochs=2, batch_size=128, resample_negatives=False))
    _, plain = trained(
        planted, FitSection(epochs=2, batch_size=128, resample_negatives=False), knowledge=False
    )
    assert result.best_value > plain.best_value + 0.10


def test_same_seed_same_weights(small):
    section = SHORT.model_copy(update={"resample_negatives": True})
    first, one = trained(small, section)
    second, two = trained(small, section)
    third, _ = trained(small, section, seed=1)
    assert [r["train_loss"] for r in one.history] == [r["train_loss"] for r in two.history]
    weights, again, other = first.state_dict(), second.state_dict(), third.state_dict()
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert not all(torch.equal(weights[key], other[key]) for key in weights)


def test_leaves_the_best_epoch_in_the_model(small):
    records = []
    model = build("prm", small.catalogue.shape, True)
    section = FitSection(
        epochs=12, batch_size=16, lr=5e-3, resample_negatives=False
    )  # overfits: the last epoch is not the best
    result = fit(
        model,
        small.catalogue,
        small.train,
        small.valid,
        small.user_vectors,
        section,
        on_epoch=records.append,
    )
    assert records == result.history and len(records) == 12
    assert set(records[0]) == {"epoch", "train_loss", "valid", "seconds", "lists_per_second"}
    assert result.best_value == max(record["valid"] for record in records)
    assert records[result.best_epoch - 1]["valid"] == result.best_value
    assert valid_ndcg(model, small) == pytest.approx(result.best_value, abs=1e-9)


def test_patience_counts_epochs_without_a_better_metric(small):
    _, result = trained(
        small, FitSection(epochs=50, batch_size=16, lr=5e-3, patience=2, resample_negatives=False)
    )
    assert len(result.history) == result.best_epoch + 2 < 50


@pytest.mark.usefixtures("one_process")
def test_data_parallel_of_one_rank_equals_no_wrapper(small):
    wrapped, result = trained(small, wrap=DistributedDataParallel)
    plain, expected = trained(small)
    assert [r["train_loss"] for r in result.history] == pytest.approx(
        [r["train_loss"] for r in expected.history]
    )
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(wrapped.state_dict()[key], value)


def test_redrawn_negatives_keep_the_given_lists(small):
    before = small.train.item_ids.clone()
    _, redrawn = trained(small, SHORT.model_copy(update={"resample_negatives": True}))
    _, fixed = trained(small)
    assert torch.equal(small.train.item_ids, before)
    assert redrawn.history[0]["train_loss"] != fixed.history[0]["train_loss"]


def test_list_data_pads_and_selects():
    lists = make_lists([[3, 1], [2, 4, 5]], [[1, 0], [0, 0, 1]], [7, 8])
    assert lists.item_ids.tolist() == [[3, 1, 0], [2, 4, 5]]
    assert lists.labels.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert lists.mask.tolist() == [[True, True, False], [True] * 3]
    assert lists.select(lists.user_ids == 8).item_ids.tolist() == [[2, 4, 5]]
    assert len(lists.select(slice(0, None, 2))) == 1
    assert lists.user_rows.tolist() == lists.user_ids.tolist() == [7, 8]
    assert len(make_lists([], [], [])) == 0
    with pytest.raises(UserError, match="differ in length"):
        make_lists([[3, 1]], [[1]], [7])


def test_lists_of_different_lengths_train(small):
    lengths = np.arange(len(small.train)) % 9 + 2
    ids = [row[:n].tolist() for row, n in zip(small.train.item_ids, lengths, strict=True)]
    labels = [row[:n].tolist() for row, n in zip(small.train.labels, lengths, strict=True)]
    ragged = make_lists(ids, labels, small.train.user_ids.tolist())
    _, result = trained(replace(small, train=ragged))
    assert math.isfinite(result.history[-1]["train_loss"])


def test_mistakes_are_named(small):
    empty = small.train.select(slice(0, 0))
    model = build("prm", small.catalogue.shape, True)
    with pytest.raises(UserError, match="0 for training"):
        fit(model, small.catalogue, empty, small.valid, small.user_vectors, SHORT)
    with pytest.raises(UserError, match="user_vectors"):
        fit(model, small.catalogue, small.train, small.valid, None, SHORT)
    with pytest.raises(UserError, match=r"reranker\.lr"):
        fit(
            model,
            small.catalogue,
            small.train,
            small.valid,
            small.user_vectors,
            SHORT.model_copy(update={"epochs": 30, "lr": 1e30}),
        )
