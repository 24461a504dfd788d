"""PRM, the personalised re-ranking model (Pei et al., RecSys 2019): positions, self-attention, MLP head.

Departures: positions are sinusoidal (as KAR's code), not learned; the output is a logit per candidate trained
with pointwise binary cross-entropy (as KAR), not a softmax over the list; no pre-trained personalised vector,
its place is taken by the knowledge adapter. KAR feeds [attention output, input] to the head where this is the
paper's whole encoder layer (post-norm), written out because `nn.TransformerEncoderLayer` costs more than its
arithmetic on lists of ten.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpo4rec_ray.rerankers.base import CatalogueShape, Reranker, RerankerSettings, score_head


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # else a table first made while scoring could not be used in training
@torch.no_grad()
def sinusoidal_positions(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Even columns sin, odd columns cos of pos / 10000^(2i/dim) (Vaswani et al., 2017) -> [length, dim].

    Kept for the next list of this length: for a single list the table costs a tenth of its forward pass.
    """
    positions = torch.arange(length, dtype=torch.float32, device=device).unsqueeze(1)
    rates = torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(10000.0) / dim))
    angles = positions * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :dim]


def padding_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What `EncoderLayer` adds to attention logits so that no padding is attended to: [B, L] -> [B, 1, 1, L]."""
    if mask is None:
        return None
    # A large finite number, not -inf: a list that is all padding must still give finite values.
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -1e9)[:, None, None, :]


class EncoderLayer(nn.Module):
    """Post-norm transformer encoder layer: x = norm(x + attention(x)); x = norm(x + feed_forward(x))."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm_attention = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 2 * dim)
        self.shrink = nn.Linear(2 * dim, dim)
        self.norm_feed_forward = nn.LayerNorm(dim)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [B, L, dim], bias [B, 1, 1, L] added to the attention logits -> [B, L, dim]."""
        batch_size, length, dim = x.shape
        heads = self.qkv(x).view(batch_size, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, L, dim / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        x = self.norm_attention(x + self.out(mixed.transpose(1, 2).reshape(batch_size, length, dim)))
        return self.norm_feed_forward(x + self.shrink(self.expand(x).relu_()))


class PRM(Reranker):
    """PRM with `num_layers` encoder layers of `num_heads` heads and a 200-80 head."""

    loss = "pointwise_bce"

    def __init__(self, shape: CatalogueShape, knowledge: bool, settings: RerankerSettings) -> None:
        super().__init__(shape, knowledge, settings)
        dim = self.embedding.width
        self.layers = nn.ModuleList(EncoderLayer(dim, settings.num_heads) for _ in range(settings.num_layers))
        self.head = score_head(dim)

    def rank(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """inputs [B, L, width], mask [B, L] or None -> logits [B, L]."""
        _, length, dim = inputs.shape
        # Xavier inputs are some ten times smaller than the positions, which would drown the items without the
        # sqrt(dim) of Vaswani et al. (section 3.4).
        x = inputs * math.sqrt(dim) + sinusoidal_positions(length, dim, inputs.device)
        bias = padding_bias(mask, x.dtype)
        for layer in self.layers:
            x = layer(x, bias)
        return self.head(x).squeeze(-1)
