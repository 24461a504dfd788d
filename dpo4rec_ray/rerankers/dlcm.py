"""DLCM, the deep listwise context model (Ai et al., SIGIR 2018): a GRU reads the list, then scores each place.

The score of place i is the local ranking function phi(o_i, s_n) = V . (o_i * tanh(W s_n + b)), o_i the state at the
place and s_n the final state. Departures: the candidates are read in the order given (as KAR's code; the paper reads
from the worst to the best of an initial ranking, which candidates drawn at random do not have); no abstract features
beside the input (the input layer takes their place); trained with pointwise binary cross-entropy (as KAR), not the
attention rank loss. KAR batch-normalises both states, which would let the lists of a batch see each other: here the
input is layer-normalised instead. On KAR's own lists this scores above KAR's DLCM: the shared input layer does it,
KAR's structure on the bare concatenation in our training gives KAR's figure.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpo4rec_ray.rerankers.base import CatalogueShape, Reranker, RerankerSettings


def gru_states(gru: nn.GRU, inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """States of a GRU that skips padding, wherever it is.

    inputs [B, L, in], mask [B, L] or None -> the state at each place [B, L, out], meaningless at padding, and the
    state at the last real place [B, out], zero for a list that is all padding.
    """
    if mask is None:
        states, last = gru(inputs)
        return states, last.squeeze(0)
    # Real places first: states only look back, so what follows them changes none. `nn.GRU` over packed sequences
    # does the same, slower on CPU.
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # [B, L]
    states, _ = gru(inputs.take_along_dim(order.unsqueeze(-1), dim=1))
    lengths = mask.sum(dim=1)
    last = states.take_along_dim((lengths - 1).clamp(min=0).view(-1, 1, 1), dim=1).squeeze(1)
    back = order.argsort(dim=1).unsqueeze(-1)
    return states.take_along_dim(back, dim=1), last * (lengths > 0).unsqueeze(-1)


class DLCM(Reranker):
    """DLCM with one GRU layer of `hidden_dim` units."""

    loss = "pointwise_bce"

    def __init__(self, shape: CatalogueShape, knowledge: bool, settings: RerankerSettings) -> None:
        super().__init__(shape, knowledge, settings)
        dim = settings.hidden_dim
        # Xavier inputs are tiny, and the score is a product of two states: without this both stay near zero.
        self.norm = nn.LayerNorm(dim)
        self.gru = nn.GRU(dim, dim, batch_first=True)
        self.context = nn.Linear(dim, dim)  # W, b
        self.weights = nn.Linear(dim, 1)  # V, and a bias

    def rank(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """inputs [B, L, hidden], mask [B, L] or None -> logits [B, L]."""
        states, last = gru_states(self.gru, self.norm(inputs), mask)
        return self.weights(states * self.context(last).tanh().unsqueeze(1)).squeeze(-1)
