from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dpo4rec_ray.rerankers.prm import sinusoidal_positions
from tests.unit.rerankers.builders import build


def positions_by_hand(length: int, dim: int) -> torch.Tensor:
    table = torch.zeros(length, dim)
    for position in range(length):
        for column in range(dim):
            angle = position / 10000 ** (2 * (column // 2) / dim)
            table[position, column] = math.cos(angle) if column % 2 else math.sin(angle)
    return table


def encoder_of_torch(layer, dim: int) -> nn.TransformerEncoderLayer:
    """torch's own post-norm layer with the weights of ours."""
    theirs = nn.TransformerEncoderLayer(dim, layer.num_heads, 2 * dim, dropout=0.0, batch_first=True)
    pairs = [
        (theirs.self_attn.in_proj_weight, layer.qkv.weight),
        (theirs.self_attn.in_proj_bias, layer.qkv.bias),
        (theirs.self_attn.out_proj.weight, layer.out.weight),
        (theirs.self_attn.out_proj.bias, layer.out.bias),
        (theirs.linear1.weight, layer.expand.weight),
        (theirs.linear1.bias, layer.expand.bias),
        (theirs.linear2.weight, layer.shrink.weight),
        (theirs.linear2.bias, layer.shrink.bias),
        (theirs.norm1.weight, layer.norm_attention.weight),
        (theirs.norm1.bias, layer.norm_attention.bias),
        (theirs.norm2.weight, layer.norm_feed_forward.weight),
        (theirs.norm2.bias, layer.norm_feed_forward.bias),
    ]
    with torch.no_grad():
        for target, source in pairs:
            target.copy_(source)
    return theirs


@pytest.mark.parametrize("masked", [False, True])
def test_prm_equals_torchs_encoder(masked, small):
    dim = 16
    model = build("prm", small.catalogue.shape, False, hidden_dim=dim, num_heads=2, num_layers=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    inputs = torch.randn(3, 7, dim)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    found = model.rank(inputs, mask if masked else None)
    hidden = inputs * dim**0.5 + positions_by_hand(7, dim)
    for layer in model.layers:
        hidden = encoder_of_torch(layer, dim)(hidden, src_key_padding_mask=~mask if masked else None)
    expected = model.head(hidden).squeeze(-1)
    real = mask if masked else torch.ones_like(mask)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


def test_positions():
    torch.testing.assert_close(sinusoidal_positions(12, 8), positions_by_hand(12, 8))
    assert sinusoidal_positions(3, 5).shape == (3, 5)
