"""SetRank (Pang et al., SIGIR 2020): self-attention over the candidates as a set, so their order does not matter.

This is the multi-head self attention block (MSAB), stacked: x = norm(x + attention(x)); x = norm(x +
feed_forward(x)); then an MLP per candidate. Departures: no ordinal (position) embedding, which the paper adds for
lists that come ranked, and no induced blocks (IMSAB); the head is KAR's 200-80; the loss is the plain softmax
cross-entropy between labels and scores (the paper's attention rank). KAR's form of it maps every score <= 0 to
zero and so has no gradient there: more than half of its seeds never learn.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from dpo4rec_ray.rerankers.base import CatalogueShape, Reranker, RerankerSettings, score_head
from dpo4rec_ray.rerankers.prm import EncoderLayer, padding_bias


class SetRank(Reranker):
    """SetRank with `num_layers` blocks of `num_heads` heads."""

    loss = "listwise_softmax"
    order_matters = False

    def __init__(self, shape: CatalogueShape, knowledge: bool, settings: RerankerSettings) -> None:
        super().__init__(shape, knowledge, settings)
        dim = self.embedding.width
        self.layers = nn.ModuleList(EncoderLayer(dim, settings.num_heads) for _ in range(settings.num_layers))
        self.head = score_head(dim)

    def rank(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """inputs [B, L, width], mask [B, L] or None -> logits [B, L]."""
        # As PRM: xavier inputs are too small for attention to tell them apart.
        x = inputs * math.sqrt(inputs.shape[-1])
        bias = padding_bias(mask, x.dtype)
        for layer in self.layers:
            x = layer(x, bias)
        return self.head(x).squeeze(-1)
