"""PRM, the personalised re-ranking model (Pei et al., RecSys 2019): positions, self-attention, MLP head.

Differences from the paper: positions are sinusoidal (as in KAR's code), not learned; the output is a logit per candidate,
trained with pointwise binary cross-entropy (as in KAR), not a softmax over the list; the knowledge adapter replaces the
pre-trained personalised vector. KAR feeds [attention output, input] to the head; here it is the paper's whole encoder layer
(post-norm). It is written out because `nn.TransformerEncoderLayer` is slower on lists of ten.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpo4rec_ray.config.ranking import RerankerArchitecture
from dpo4rec_ray.rerankers.base import CatalogueShape, ListHistory, Reranker, score_head


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a table that was made in inference mode could not be used in training
@torch.no_grad()
def sinusoidal_positions(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Even columns sin, odd columns cos of pos / 10000^(2i/dim) (Vaswani et al., 2017) -> [length, dim].

    Cached by length: for a single list, computing the table takes a tenth of the forward pass.
    """
    positions = torch.arange(length, dtype=torch.float32, device=device).unsqueeze(1)
    rates = torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(10000.0) / dim))
    angles = positions * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :dim]


def padding_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to attention logits so that padding gets no attention: [B, L] -> [B, 1, 1, L]."""
    if mask is None:
        return None
    # A large finite number, not -inf: a list that is all padding must still give finite values.
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -1e9)[:, None, None, :]


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al., 2017) without a residual."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [B, L, dim], bias [B, 1, 1, L] or None, added to the attention logits -> [B, L, dim]."""
        batch_size, length, dim = x.shape
        heads = self.qkv(x).view(batch_size, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, L, dim / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out(mixed.transpose(1, 2).reshape(batch_size, length, dim))


class EncoderLayer(SelfAttention):
    """Post-norm transformer encoder layer: x = norm(x + attention(x)); x = norm(x + feed_forward(x))."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        self.norm_attention = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 2 * dim)
        self.shrink = nn.Linear(2 * dim, dim)
        self.norm_feed_forward = nn.LayerNorm(dim)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `SelfAttention.forward`."""
        x = self.norm_attention(x + super().forward(x, bias))
        return self.norm_feed_forward(x + self.shrink(self.expand(x).relu_()))


class PRM(Reranker):
    """PRM with `num_layers` encoder layers of `num_heads` heads and a 200-80 head."""

    def __init__(self, shape: CatalogueShape, knowledge: bool, architecture: RerankerArchitecture) -> None:
        super().__init__(shape, knowledge, architecture)
        dim = self.embedding.width
        self.layers = nn.ModuleList(
            EncoderLayer(dim, architecture.num_heads) for _ in range(architecture.num_layers)
        )
        self.head = score_head(dim)

    def rank(self, inputs: Tensor, mask: Tensor | None, history: ListHistory | None = None) -> Tensor:
        """inputs [B, L, width], mask [B, L] or None -> logits [B, L]."""
        _, length, dim = inputs.shape
        # Xavier inputs are about ten times smaller than the positions, and too small for attention to tell them apart.
        # Without the sqrt(dim) of Vaswani et al. (section 3.4), the items would hardly count.
        x = inputs * math.sqrt(dim)
        if self.order_matters:
            x = x + sinusoidal_positions(length, dim, inputs.device)
        bias = padding_bias(mask, x.dtype)
        for layer in self.layers:
            x = layer(x, bias)
        return self.head(x).squeeze(-1)
