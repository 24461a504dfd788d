"""What is added behind a backbone: nothing at first, then two terms that can be worked out by hand."""

from __future__ import annotations

import pytest
import torch

from dpo4rec_ray.config.ranking import RerankerArchitecture
from dpo4rec_ray.rerankers import RERANKERS
from dpo4rec_ray.rerankers.adapter import ADAPTERS
from dpo4rec_ray.rerankers.branches import BRANCHES, ResidualAdapter, TextRegression
from dpo4rec_ray.rerankers.catalogue import CatalogueShape
from dpo4rec_ray.rerankers.scorer import ListScorer
from tests.unit.rerankers.builders import build, with_full_branch

SHAPE = CatalogueShape(3, (), 2, "")
INDEX = torch.tensor([[0, 1, 2], [2, 2, 0]])
every_way = pytest.mark.parametrize("way", BRANCHES)


def scores(model, world):
    lists = world.train.select(slice(6))
    batch = world.catalogue.batch(lists.item_ids, None, torch.from_numpy(world.user_vectors), lists.user_rows)
    served = ListScorer([model], world.catalogue).score(
        lists.item_ids, None, world.user_vectors, lists.user_rows
    )
    return model.eval()(batch), torch.from_numpy(served)


@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
@pytest.mark.parametrize("name", sorted(RERANKERS))
@every_way
def test_a_new_branch_ranks_exactly_as_the_backbone_and_an_erased_one_again(way, name, adapter, small):
    """Bit by bit, as a batch and from a scorer's tables: the weights of the backbone are those of the same seed."""
    backbone = scores(build(name, small.catalogue.shape, False, seed=5), small)
    model = build(name, small.catalogue.shape, True, seed=5, way=way, adapter=adapter)
    assert all(map(torch.equal, scores(model, small), backbone))
    changed = scores(with_full_branch(model), small)
    assert not any(map(torch.allclose, changed, backbone))
    model.branch.erase()
    assert all(map(torch.equal, scores(model, small), backbone))


def test_without_knowledge_and_in_the_input_layer_there_is_no_branch(small):
    for way, knowledge in (("input", True), ("regression", False), ("residual", False)):
        assert build("prm", small.catalogue.shape, knowledge, way=way).branch is None


@every_way
@pytest.mark.parametrize("name", sorted(RERANKERS))
def test_a_user_without_a_text_is_ranked_as_by_the_backbone(name, way, small):
    """Zeros in the place of a vector, beside users who have one."""
    backbone, lists = build(name, small.catalogue.shape, False), small.train.select(slice(6))
    model = with_full_branch(build(name, small.catalogue.shape, True, way=way))
    vectors = torch.from_numpy(small.user_vectors)[lists.user_rows]
    vectors[2] = 0
    plain = ListScorer([backbone], small.catalogue).score(lists.item_ids)
    found = ListScorer([model], small.catalogue).score(lists.item_ids, None, vectors)
    assert (found[2] == plain[2]).all()
    assert not any(
        (one == other).all() for one, other in zip(found[[0, 1, 3]], plain[[0, 1, 3]], strict=True)
    )


def test_a_regression_is_affinity_and_similarity_by_their_gates():
    """Texts (3, 4) and (0, 2) are (.6, .8) and (0, 1) as unit vectors, less the mean (.1, 0): (.5, .8) and (-.1, 1).

    Through the map [[2], [1]]: 1.8 and .8. Items have the factors 1, -1 and 2; affinity counts half, similarity thrice.
    """
    branch = TextRegression(SHAPE, RerankerArchitecture(regression_rank=1))
    branch.mean.copy_(torch.tensor([0.1, 0.0]))
    branch.text_map.copy_(torch.tensor([[2.0], [1.0]]))
    branch.item_factors.copy_(torch.tensor([[1.0], [-1.0], [2.0]]))
    branch.gates.copy_(torch.tensor([0.5, 3.0]))
    users = branch.user_side(torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]]))
    torch.testing.assert_close(users, torch.tensor([[1.8], [0.8], [0.0]]))
    items = branch.item_side(torch.arange(3), torch.zeros(3, 2))
    similarity = torch.tensor([[0.0, 0.1, 0.0], [0.0, 0.0, -0.1]])
    expected = torch.tensor([[0.9, -0.9 + 0.3, 1.8], [0.8, 0.8, 0.4 - 0.3]])
    torch.testing.assert_close(branch.logits(items, INDEX, users, torch.tensor([0, 1]), similarity), expected)
    torch.testing.assert_close(branch.logits(items, INDEX, users[:2], None, similarity), expected)


def test_the_rank_is_no_larger_than_the_catalogue_or_the_vectors():
    for shape, rank in ((SHAPE, 2), (CatalogueShape(3, (), 8, ""), 3), (CatalogueShape(90, (), 80, ""), 64)):
        branch = TextRegression(shape, RerankerArchitecture())
        assert (branch.text_map.shape, branch.item_factors.shape) == (
            (shape.vector_dim, rank),
            (shape.num_items, rank),
        )


def test_a_regression_has_nothing_to_train_and_all_of_it_is_saved():
    branch = TextRegression(SHAPE, RerankerArchitecture())
    assert not list(branch.parameters())
    assert set(branch.state_dict()) == {"mean", "text_map", "item_factors", "gates"}


def test_a_residual_is_the_projected_product_and_weighed_similarity():
    """W doubles the user's side of an adapter that passes vectors on."""

    class Same(torch.nn.Module):
        def user_side(self, vectors):
            return vectors

        item_side = user_side

    branch = ResidualAdapter(SHAPE, RerankerArchitecture(adapter="mlp", adapter_dim=2)).eval()
    branch.adapter = Same()
    with torch.no_grad():
        branch.user_projection.weight.copy_(2 * torch.eye(2))
        branch.similarity_weight.fill_(0.5)
    items = branch.item_side(torch.arange(3), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]))
    users = branch.user_side(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    similarity = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    found = branch.logits(items, INDEX, users, None, similarity)
    assert found.tolist() == [[6.0, 8.5, -2.0], [2.0, 2.0, 3.0]]


def test_without_similarity_a_residual_has_no_weight_for_it():
    branch = ResidualAdapter(SHAPE, RerankerArchitecture(similarity=False))
    assert branch.similarity_weight is None
    branch.erase()
