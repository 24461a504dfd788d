"""DLCM, the deep listwise context model (Ai et al., SIGIR 2018): a GRU reads the list, then scores each place.

The score of place i is the local ranking function phi(o_i, s_n) = V . (o_i * tanh(W s_n + b)), where o_i is the state at
the place and s_n the final state. Differences from the paper: the candidates are read in the given order (as in KAR's
code; the paper reads an initial ranking from the worst to the best, and candidates drawn at random have none); the input
layer replaces the abstract features; the loss is pointwise binary cross-entropy (as in KAR), not the attention rank loss.

With `input_layer = "concat"` this is KAR's DLCM: both states are batch-normalised, and it reaches KAR's metrics on KAR's
own lists (tests/parity/test_reference_lists.py). Layer norms instead score higher; without a norm, one seed of three stays
at popularity level. With "linear" the input is layer-normalised instead, so that the lists of a batch do not influence each
other in training; it scores higher than KAR's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpo4rec_ray.config.ranking import RerankerArchitecture
from dpo4rec_ray.rerankers.base import CatalogueShape, ListHistory, Reranker


def gru_states(gru: nn.GRU, inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """States of a GRU that skips padding, which may be at any place.

    inputs [B, L, in], mask [B, L] or None -> the state at each place [B, L, out], undefined at padding, and the state
    at the last real place [B, out], zero for a list of padding alone.
    """
    if mask is None:
        states, last = gru(inputs)
        return states, last.squeeze(0)
    # Real places first: a state depends on earlier places only, so the padding behind them has no effect. Packed
    # sequences do the same and are slower on CPU.
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # [B, L]
    states, _ = gru(inputs.take_along_dim(order.unsqueeze(-1), dim=1))
    lengths = mask.sum(dim=1)
    last = states.take_along_dim((lengths - 1).clamp(min=0).view(-1, 1, 1), dim=1).squeeze(1)
    back = order.argsort(dim=1).unsqueeze(-1)
    return states.take_along_dim(back, dim=1), last * (lengths > 0).unsqueeze(-1)


def normalised(norm: nn.BatchNorm1d, states: Tensor, mask: Tensor | None) -> Tensor:
    """Batch normalisation that ignores padding. In eval mode it uses the running statistics, as nn.BatchNorm1d.

    states [..., out], mask [...] or None -> [..., out], zero at padding.
    """
    real = states.flatten(0, -2) if mask is None else states[mask]
    # Not norm(real): in training that raises for a single state, which has no variance.
    from_batch = norm.training and len(real) > 1
    normed = F.batch_norm(
        real, norm.running_mean, norm.running_var, norm.weight, norm.bias, from_batch, norm.momentum, norm.eps
    )
    if mask is None:
        return normed.view(states.shape)
    return normed.new_zeros(states.shape).masked_scatter(mask.unsqueeze(-1), normed)


class DLCM(Reranker):
    """DLCM with one GRU layer of `hidden_dim` units."""

    def __init__(self, shape: CatalogueShape, knowledge: bool, architecture: RerankerArchitecture) -> None:
        super().__init__(shape, knowledge, architecture)
        width, dim = self.embedding.width, architecture.hidden_dim
        # Xavier inputs are small and the score is a product of two states: without a norm, both stay near zero.
        self.norm: nn.LayerNorm | None = None
        self.norm_states: nn.BatchNorm1d | None = None
        self.norm_last: nn.BatchNorm1d | None = None
        if architecture.input_layer == "linear":
            self.norm = nn.LayerNorm(width)
        else:
            self.norm_states, self.norm_last = nn.BatchNorm1d(dim), nn.BatchNorm1d(dim)
        self.gru = nn.GRU(width, dim, batch_first=True)
        self.context = nn.Linear(dim, dim)  # W, b
        self.weights = nn.Linear(dim, 1)  # V, and a bias

    def rank(self, inputs: Tensor, mask: Tensor | None, history: ListHistory | None = None) -> Tensor:
        """inputs [B, L, width], mask [B, L] or None -> logits [B, L]."""
        states, last = gru_states(self.gru, inputs if self.norm is None else self.norm(inputs), mask)
        if self.norm_states is not None and self.norm_last is not None:
            states = normalised(self.norm_states, states, mask)
            last = normalised(self.norm_last, last, None if mask is None else mask.any(dim=1))
        return self.weights(states * self.context(last).tanh().unsqueeze(1)).squeeze(-1)
