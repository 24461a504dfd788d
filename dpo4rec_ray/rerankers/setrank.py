"""SetRank (Pang et al., SIGIR 2020): self-attention over the candidates as a set, so their order does not matter.

Stacked multi-head self-attention blocks (MSAB): x = norm(x + attention(x)); x = norm(x + feed_forward(x)); then an MLP per
candidate. Differences from the paper: no ordinal (position) embedding, which it adds for lists that are already ranked, and
no induced blocks (IMSAB); the head is KAR's 200-80. The loss is the paper's attention rank: the softmax cross-entropy
between labels and scores. KAR's form of it maps every score <= 0 to zero and so has no gradient there: more than half of
its seeds never learn.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from dpo4rec_ray.config.ranking import RerankerArchitecture
from dpo4rec_ray.rerankers.base import CatalogueShape, Reranker, score_head
from dpo4rec_ray.rerankers.prm import EncoderLayer, padding_bias


class SetRank(Reranker):
    """SetRank with `num_layers` blocks of `num_heads` heads."""

    loss = "listwise_softmax"
    order_matters = False

    def __init__(self, shape: CatalogueShape, knowledge: bool, architecture: RerankerArchitecture) -> None:
        super().__init__(shape, knowledge, architecture)
        dim = self.embedding.width
        self.layers = nn.ModuleList(
            EncoderLayer(dim, architecture.num_heads) for _ in range(architecture.num_layers)
        )
        self.head = score_head(dim)

    def rank(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """inputs [B, L, width], mask [B, L] or None -> logits [B, L]."""
        # As in PRM: xavier inputs are too small for attention to tell them apart.
        x = inputs * math.sqrt(inputs.shape[-1])
        bias = padding_bias(mask, x.dtype)
        for layer in self.layers:
            x = layer(x, bias)
        return self.head(x).squeeze(-1)
