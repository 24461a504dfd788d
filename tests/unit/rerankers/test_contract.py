"""What every backbone in RERANKERS must do: with both input layers, without knowledge and with every adapter, with
knowledge in the input layer and behind the backbone, with history and without.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import pytest
import torch

from dpo4rec_ray.config import default_config
from dpo4rec_ray.config.ranking import FitSection, RerankerArchitecture
from dpo4rec_ray.core.losses import RANKING_LOSSES
from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers import RERANKERS, Reranker, build_reranker
from dpo4rec_ray.rerankers.adapter import ADAPTERS
from dpo4rec_ray.rerankers.branches import BRANCHES
from dpo4rec_ray.rerankers.card import CARD_FILE
from dpo4rec_ray.rerankers.catalogue import Catalogue, Histories, RerankBatch
from dpo4rec_ray.rerankers.fit import fit, load_reranker, save_reranker
from tests.unit.rerankers.builders import WAYS, with_full_branch
from tests.unit.rerankers.builders import build as build_for


@dataclass(frozen=True)
class Case:
    """A backbone in one of its forms; `adapter` None: without knowledge."""

    name: str
    adapter: str | None
    history: bool
    input_layer: str = "linear"
    way: str = "input"

    def __str__(self) -> str:
        parts = [self.name, self.input_layer, self.adapter or "plain", self.way, *["history"] * self.history]
        return "-".join(part for part in parts if part != "input")

    def model(self, world) -> Reranker:
        settings = {"adapter": self.adapter or "hea", "input_layer": self.input_layer, "way": self.way}
        # Dropout would draw other lists in each of the calls that are compared.
        return with_full_branch(
            build(self.name, world, self.adapter is not None, knowledge_dropout=0.0, **settings)
        )

    def batch(self, world, item_ids=None, mask=None, rows=slice(6)) -> RerankBatch:
        """The lists `rows` of the world, or other candidates for the same users and histories."""
        lists = world.train.select(rows)
        vectors = torch.from_numpy(world.user_vectors) if self.adapter else None
        ids = lists.item_ids if item_ids is None else item_ids
        if not self.history:
            return world.catalogue.batch(ids, mask, vectors, lists.user_rows)
        rng = np.random.default_rng(0)  # the same history for the same list
        shape = (len(world.train), 4)
        seen = torch.from_numpy(rng.integers(0, world.catalogue.shape.num_items, shape))[rows]
        real = torch.from_numpy(rng.random(shape) < 0.7)
        real[1] = False  # a user without history
        stars = torch.from_numpy(rng.integers(1, 6, shape)).float()
        histories = Histories(seen, real[rows], stars[rows])
        return world.catalogue.batch(ids, mask, vectors, lists.user_rows, histories)


INPUT_LAYERS = get_args(RerankerArchitecture.model_fields["input_layer"].annotation)
CASES = [
    Case(name, adapter, history, input_layer)
    for name, backbone in sorted(RERANKERS.items())
    for input_layer in INPUT_LAYERS
    for adapter in (None, *sorted(ADAPTERS))
    for history in ([False, True] if backbone.uses_history else [False])
] + [
    Case(name, "hea", history, way=way)
    for name, backbone in sorted(RERANKERS.items())
    for way in BRANCHES
    for history in ([False, True] if backbone.uses_history else [False])
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_backbone = pytest.mark.parametrize("name", sorted(RERANKERS))
every_input_layer = pytest.mark.parametrize("input_layer", INPUT_LAYERS)
every_way = pytest.mark.parametrize("way", WAYS)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@every_case
def test_scores_have_one_finite_value_per_candidate(case, small):
    scores = case.model(small)(case.batch(small))
    assert scores.shape == (6, 10) and scores.dtype == torch.float32
    assert scores.isfinite().all() and scores.std() > 0


@every_case
def test_padding_changes_no_score(case, small):
    model, ids = case.model(small), small.train.item_ids[:6, :5]
    bare = model(case.batch(small, ids))
    for filler in (0, 17):
        padded_ids = torch.cat([ids, torch.full((6, 3), filler)], dim=1)
        mask = torch.tensor([[True] * 5 + [False] * 3]).expand(6, -1)
        close(model(case.batch(small, padded_ids, mask))[:, :5], bare)


@every_case
def test_padding_changes_nothing_in_training(case, small):
    """Padding changes neither the loss nor the statistics that the model keeps."""
    lists = small.train.select(slice(6))
    found = []
    for padding, filler in ((0, 0), (3, 0), (3, 17)):
        model = case.model(small).train()
        ids = torch.cat([lists.item_ids, torch.full((6, padding), filler)], dim=1)
        labels = torch.cat([lists.labels, torch.zeros(6, padding)], dim=1)
        mask = (torch.arange(10 + padding) < 10).expand(6, -1)
        batch = case.batch(small, ids, mask if padding else None)
        found.append((RANKING_LOSSES[model.loss](model(batch), labels, mask), dict(model.named_buffers())))
    (loss, kept), *padded = found
    for other_loss, other_kept in padded:
        close(other_loss, loss)
        for name, value in kept.items():
            close(other_kept[name], value)


@every_case
def test_lists_of_2_to_200_candidates_in_one_batch(case, small):
    """Each list gets the scores that it gets in a batch of its own, whatever the lengths of the others."""
    lengths = [2, 200, 57, 10, 3, 128]
    rng = np.random.default_rng(1)
    ids = torch.from_numpy(rng.integers(0, small.catalogue.shape.num_items, (6, 200)))
    mask = torch.arange(200) < torch.tensor(lengths).unsqueeze(1)
    model = case.model(small)
    together = model(case.batch(small, ids, mask))
    assert together.isfinite().all()
    for row, length in enumerate(lengths):
        alone = model(case.batch(small, ids[row : row + 1, :length], rows=slice(row, row + 1)))
        close(together[row : row + 1, :length], alone)


@every_case
def test_masked_places_never_win(case, small):
    mask = torch.ones(6, 10, dtype=torch.bool)
    mask[0, 2:] = False
    mask[1, ::2] = False
    mask[2] = False  # a list of nothing but padding
    model, batch = case.model(small), case.batch(small, mask=mask)
    assert model(batch).isfinite().all()
    scores = model.score(batch)
    assert torch.equal(scores == float("-inf"), ~mask)
    assert mask[0, scores[0].argmax()] and mask[1, scores[1].argmax()]
    # Only padding is relevant: no ranking of the real candidates can earn anything.
    labels = (~mask).float().numpy()
    assert np.all(list_metrics(scores.detach().numpy(), labels, ["ndcg@5"], mask.numpy())["ndcg@5"] == 0)


@every_case
def test_order_of_candidates(case, small):
    """A backbone that says that order does not matter is permutation equivariant; the others are not."""
    model, order = case.model(small), torch.tensor([3, 9, 0, 7, 1, 8, 2, 6, 5, 4])
    ids, mask = small.train.item_ids[:6], torch.ones(6, 10, dtype=torch.bool)
    mask[0, 4:] = False
    in_order = model(case.batch(small, ids, mask))
    permuted = model(case.batch(small, ids[:, order], mask[:, order]))
    real = mask[:, order]
    if model.order_matters:
        assert (permuted - in_order[:, order])[real].abs().max() > 1e-3
    else:
        close(permuted[real], in_order[:, order][real])


@every_case
def test_lists_do_not_see_each_other(case, small):
    model = case.model(small)
    close(model(case.batch(small))[:1], model(case.batch(small, rows=slice(1))))


@every_case
@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16(case, masked, small):
    """Under autocast, as it is trained and served: finite, close to float32, and so are the gradients."""
    mask = torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[2] = False
    model, batch = case.model(small), case.batch(small, mask=mask if masked else None)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(batch)
        RANKING_LOSSES[model.loss](scores.float(), small.train.labels[:6], mask).backward()
    assert scores.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(scores.float(), model(batch), rtol=0.05, atol=0.05)


@every_case
def test_every_parameter_is_trained(case, small):
    """DistributedDataParallel waits for the gradient of every parameter, and a parameter with a zero gradient learns nothing."""
    model, lists = case.model(small), small.train
    scores = model(case.batch(small, rows=slice(len(lists))))
    RANKING_LOSSES[model.loss](scores, lists.labels, lists.mask).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    still = {name for name, gradient in gradients.items() if not gradient.abs().max() > 1e-9}
    if model.loss == "listwise_softmax":
        still -= {"head.4.bias"}  # a constant added to all scores of a list changes no softmax
    if not model.uses_history or case.history:
        assert still == set()


@every_backbone
@pytest.mark.parametrize(
    ("input_layer", "adapter"), [*(("linear", adapter) for adapter in sorted(ADAPTERS)), ("concat", "hea")]
)
def test_learns_a_planted_signal(name, input_layer, adapter, planted):
    """Held-out users; labels follow user vector . item vector, which needs knowledge."""
    few = planted.train.select(slice(480))
    # Bare, the similarity is one small number among many, which a GRU without a norm of its inputs is slow to find.
    epochs = 5 if input_layer == "linear" else 10
    ndcg = {}
    for knowledge in (False, True):
        model = build(name, planted, knowledge, adapter=adapter, input_layer=input_layer)
        budget = FitSection(epochs=epochs, batch_size=64, resample_negatives=False)
        vectors = planted.user_vectors if knowledge else None
        ndcg[knowledge] = fit(model, planted.catalogue, few, planted.valid, vectors, budget).best_value
    assert ndcg[True] > ndcg[False] + 0.2, ndcg


@every_case
def test_save_and_load_give_equal_scores(case, small, tmp_path):
    model, batch = case.model(small), case.batch(small)
    save_reranker(tmp_path, model, {"fold": 2})
    assert {"model.safetensors", "reranker.json"} <= {path.name for path in tmp_path.iterdir()}
    loaded = load_reranker(tmp_path, small.catalogue)
    assert loaded.architecture == model.architecture
    assert torch.equal(loaded(batch), model(batch))


@every_backbone
def test_a_reranker_that_was_saved_before_there_was_a_choice_reads_in_its_input_layer(name, small, tmp_path):
    case = Case(name, "hea", False)
    model, batch = case.model(small), case.batch(small)
    save_reranker(tmp_path, model, {})
    card = json.loads((tmp_path / CARD_FILE).read_text())
    assert card["settings"].pop("knowledge") == "input"
    (tmp_path / CARD_FILE).write_text(json.dumps(card))
    assert torch.equal(load_reranker(tmp_path, small.catalogue)(batch), model(batch))


def build(name, world, knowledge=True, **settings):
    return build_for(name, world.catalogue.shape, knowledge, seed=3, **settings).eval()


@every_backbone
@every_input_layer
@every_way
def test_knowledge_is_used_only_when_asked(name, input_layer, way, small):
    with_vectors, without = Case(name, "hea", False).batch(small), Case(name, None, False).batch(small)
    plain = build(name, small, knowledge=False, input_layer=input_layer, way=way)
    assert torch.equal(plain(with_vectors), plain(without))
    knowing = with_full_branch(build(name, small, knowledge=True, input_layer=input_layer, way=way))
    other = replace(with_vectors, user_vectors=with_vectors.user_vectors.flip(0))
    assert not torch.allclose(knowing(with_vectors), knowing(other))
    with pytest.raises(UserError, match="user_vectors"):
        knowing(without)


@every_backbone
@every_input_layer
@every_way
def test_similarity_changes_scores_unless_off(name, input_layer, way, small):
    batch = Case(name, "hea", False).batch(small)
    changed = replace(batch, similarity=batch.similarity.flip(1))
    on = with_full_branch(build(name, small, input_layer=input_layer, way=way))
    off = with_full_branch(build(name, small, similarity=False, input_layer=input_layer, way=way))
    if way == "regression":
        off.branch.gates[1] = 0.0  # the fit does not look for another; test_fit_knowledge.py
    assert not torch.allclose(on(batch), on(changed), atol=1e-3)
    assert torch.equal(off(batch), off(changed))


@every_backbone
def test_load_refuses_another_catalogue(name, small, tmp_path):
    save_reranker(tmp_path, build(name, small), {})
    vectors = small.catalogue.item_vectors
    renamed = Catalogue.from_items([["genre: x"]] * len(vectors), vectors)
    with pytest.raises(UserError, match="trained on"):
        load_reranker(tmp_path, renamed)
    with pytest.raises(UserError, match=r"reranker\.json"):
        load_reranker(tmp_path / "nothing", small.catalogue)


@every_backbone
def test_same_seed_same_weights_and_global_generator_untouched(name, small):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second = build(name, small).state_dict(), build(name, small).state_dict()
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[key], second[key]) for key in first)


@every_backbone
def test_unknown_names_list_the_known(name, small):
    with pytest.raises(UserError, match=name):
        build("prmm", small, False)
    with pytest.raises(UserError, match="hea"):
        build(name, small, adapter="heaa")
    with pytest.raises(UserError, match=r"linaer.*'linear' or 'concat'"):
        default_config(["reranker.input_layer=linaer"])
    without_vectors = Catalogue.from_items([["genre: x"]]).shape
    with pytest.raises(UserError, match="item vectors"):
        build_reranker(RerankerArchitecture(backbone=name), without_vectors, True)
