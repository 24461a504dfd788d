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
from dpo4rec_ray.rerankers.catalogue import Catalogue
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


def test_one_text_per_user_may_have_an_axis_of_its_own(small):
    expected, one = trained(small)
    found, two = trained(replace(small, user_vectors=small.user_vectors[:, None]))
    assert one.best_value == two.best_value
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))


def test_training_lists_read_any_text_of_their_user_and_validation_lists_the_first(small, monkeypatch):
    noise = np.random.default_rng(0).normal(size=(len(small.user_vectors), 2, 48))
    vectors = np.concatenate([small.user_vectors[:, None], noise], axis=1).astype(np.float32)
    read, batch = [], Catalogue.batch

    def noted(self, item_ids, mask, user_vectors, user_rows, histories):
        read.append(user_rows)
        return batch(self, item_ids, mask, user_vectors, user_rows, histories)

    monkeypatch.setattr(Catalogue, "batch", noted)
    model, result = trained(replace(small, user_vectors=vectors))
    rows = torch.cat(read).view(3, -1)  # of three epochs
    owners = small.train.user_rows.sort().values
    assert all(torch.equal((own // 3).sort().values, owners) for own in rows)
    shares = torch.stack([torch.bincount(own % 3, minlength=3) for own in rows]) / len(small.train)
    assert (
        shares.min() > 0.18 and shares.max() < 0.49
    )  # a third of about 100 lists, within three standard errors
    assert not torch.equal(rows[0].sort().values, rows[1].sort().values), "each epoch draws anew"
    monkeypatch.undo()
    assert valid_ndcg(model, small) == pytest.approx(result.best_value, abs=1e-9)


def test_dropout_trains_a_branch_on_some_lists_without_their_texts(small, monkeypatch):
    """Anew in every epoch; they read a row of zeros. Validation lists keep their texts."""
    read, batch = [], Catalogue.batch

    def noted(self, item_ids, mask, user_vectors, user_rows, histories):
        read.append((user_vectors[user_rows] == 0).all(dim=1))
        return batch(self, item_ids, mask, user_vectors, user_rows, histories)

    monkeypatch.setattr(Catalogue, "batch", noted)
    shares = {}
    for way, dropout in (("residual", 0.0), ("residual", 0.4), ("input", 0.4)):
        read.clear()
        model, result = trained(small, way=way, knowledge_dropout=dropout)
        shares[way, dropout] = torch.cat(read).view(3, -1).float().mean(dim=1)
        assert valid_ndcg(model, small) == pytest.approx(result.best_value, abs=1e-9)
    assert shares["residual", 0.0].max() == shares["input", 0.4].max() == 0
    assert (shares["residual", 0.4] - 0.4).abs().max() < 0.15  # three standard errors of about 100 lists
    assert len(shares["residual", 0.4].unique()) > 1


def test_a_branch_with_dropout_depends_on_the_seed_alone(small):
    first, second = (trained(small, way="residual", knowledge_dropout=0.4)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


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
