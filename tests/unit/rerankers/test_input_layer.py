"""The sum of parts equals the one vector per candidate that it replaces: as it is, or through one linear map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dpo4rec_ray.rerankers.base import ListEmbedding
from tests.unit.rerankers.builders import build, inputs_of


def layer_of(world, **settings) -> ListEmbedding:
    return build("prm", world.catalogue.shape, True, seed=1, **settings).embedding


def concatenations(layer: ListEmbedding, world) -> tuple[Tensor, Tensor]:
    """The layer's output for two lists, and [id, facets, adapter(item), adapter(user), similarity], one candidate at a time."""
    users = torch.from_numpy(world.user_vectors)
    ids, rows = world.train.item_ids[:2], world.train.user_rows[:2]
    batch = world.catalogue.batch(ids, None, users, rows)
    starts = [0, world.catalogue.shape.facet_sizes[0]]
    lists = []
    for b in range(2):
        candidates = []
        for place in range(10):
            item = ids[b, place]
            facets = [
                layer.facet_embedding.weight[starts[f] + world.catalogue.attribute_ids[item, f]]
                for f in range(2)
            ]
            item_vector = layer.adapter.item_side(world.catalogue.item_vectors[item][None])[0]
            user_vector = layer.adapter.user_side(users[rows[b]][None])[0]
            features = [layer.item_embedding.weight[item], *facets, item_vector, user_vector]
            candidates.append(torch.cat([*features, batch.similarity[b, place][None]]))
        lists.append(torch.stack(candidates))
    return inputs_of(layer, batch), torch.stack(lists)


def test_linear_is_one_map_of_the_concatenation(small):
    layer = layer_of(small, input_layer="linear", hidden_dim=24)
    found, bare = concatenations(layer, small)
    maps = (layer.item_projection, layer.user_projection, layer.similarity_projection)
    weight = torch.cat([part.weight for part in maps], dim=1)
    assert found.shape == (2, 10, 24)
    torch.testing.assert_close(found, bare @ weight.t() + layer.item_projection.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_heads", "width"), [(1, 51), (2, 52), (3, 51), (8, 56)])
def test_concat_is_the_bare_concatenation_and_zeros_up_to_the_heads(num_heads, width, small):
    """Three embeddings of 10, the adapter's 10 for either side, the similarity: 51."""
    layer = layer_of(small, input_layer="concat", embed_dim=10, adapter_dim=10, num_heads=num_heads)
    found, bare = concatenations(layer, small)
    assert bare.shape == (2, 10, 51) and found.shape == (2, 10, width) and layer.width == width
    torch.testing.assert_close(found[..., :51], bare)
    assert not found[..., 51:].any()


def test_concat_has_no_weights_but_the_features(small):
    """No weights of the linear layer, and no columns for knowledge in a reranker without knowledge."""
    layer = layer_of(small, input_layer="concat")
    names = {name.split(".")[0] for name, _ in layer.named_parameters()}
    assert names == {"item_embedding", "facet_embedding", "adapter"}
    concat = {"input_layer": "concat", "embed_dim": 10}
    assert build("prm", small.catalogue.shape, False, **concat).embedding.width == 30
    concat |= {"adapter_dim": 10, "similarity": False}
    assert build("prm", small.catalogue.shape, True, **concat).embedding.width == 50
