"""MIR, multi-level interaction reranking (Xi et al., SIGIR 2022): candidates as a set against the history as a list.

1. Within the set: self-attention over the candidates, v_l = [e_l, e'_l].
2. Within the list: a GRU over the history with its ratings, q_h = [x_h, g_h].
3. Set to list: affinity C[l, h] = v_l W q_h, and from it two attention maps: over the history for each candidate,
   A[l, h] = softmax_h(C[l, h] + w_q . q_h), and over the candidates, softmax_l'(sum_h A[l, h] C[l', h] + w_v . v_l').
4. An MLP over [attended candidates, attended history, e_l, mean of q].

Permuting the candidates permutes the scores and changes none of them; the history's order matters. Differences from the
paper: its attention maps have one column of weights per place (W_v, W_q in R^{d x L}), which fixes the length of the lists
and the order of the candidates; here A is used instead of W_q's column, and each candidate's own w_v . v instead of W_v's. The
affinity is scaled by the root of its width instead of passed through tanh. As in KAR's code, a GRU replaces the BiLSTM, the
history enters as its mean, and there is no decay in time (histories have no times). The paper's affinity of single
features is left out, because our input layer has merged the features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dpo4rec_ray.config.ranking import RerankerArchitecture
from dpo4rec_ray.rerankers.base import CatalogueShape, ListHistory, Reranker, score_head
from dpo4rec_ray.rerankers.dlcm import gru_states
from dpo4rec_ray.rerankers.prm import SelfAttention, padding_bias

NUM_RATINGS = 6  # 0: unknown, then one to five stars


class SetToList(nn.Module):
    """Step 3: what each candidate attends to in the set and in the history."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.affinity = nn.Linear(dim, dim, bias=False)  # W
        self.set_weight = nn.Linear(dim, 1, bias=False)  # w_v
        self.list_weight = nn.Linear(dim, 1, bias=False)  # w_q

    def forward(
        self, candidates: Tensor, mask: Tensor | None, history: Tensor, history_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """candidates [B, L, dim], history [B, H, dim], zero at padding -> both attended, [B, L, dim].

        A list without history has equal weights over its padding, whose vectors are zero, so the result is zero.
        """
        scale = 1 / math.sqrt(candidates.shape[-1])
        affinity = self.affinity(candidates) @ history.transpose(1, 2) * scale  # [B, L, H]
        to_list = affinity + self.list_weight(history).transpose(1, 2)
        to_list = to_list.masked_fill(~history_mask.unsqueeze(1), -1e9).softmax(dim=-1)
        to_set = to_list @ affinity.transpose(1, 2) + self.set_weight(candidates).transpose(1, 2)  # [B, L, L]
        if mask is not None:
            to_set = to_set.masked_fill(~mask.unsqueeze(1), -1e9)
        return to_set.softmax(dim=-1) @ candidates, to_list @ history


class MIR(Reranker):
    """MIR with `num_heads` heads and a GRU of as many units as the input layer is wide."""

    order_matters = False
    uses_history = True

    def __init__(self, shape: CatalogueShape, knowledge: bool, architecture: RerankerArchitecture) -> None:
        super().__init__(shape, knowledge, architecture)
        dim = self.embedding.width
        self.rating_embedding = nn.Embedding(NUM_RATINGS, dim)
        # With Xavier weights the inputs are too small for attention, and larger with knowledge than without.
        self.norm_set, self.norm_list = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.within_set = SelfAttention(dim, architecture.num_heads)
        self.within_list = nn.GRU(dim, dim, batch_first=True)
        self.set_to_list = SetToList(2 * dim)
        self.head = score_head(7 * dim)

    def rank(self, inputs: Tensor, mask: Tensor | None, history: ListHistory | None = None) -> Tensor:
        """inputs [B, L, width], mask [B, L] or None -> logits [B, L]."""
        batch_size, length, dim = inputs.shape
        if history is None or not history.items.shape[1]:
            # One place of padding, so that every parameter has its (zero) gradient.
            nothing = torch.zeros(batch_size, 1, dtype=torch.bool, device=inputs.device)
            history = ListHistory(inputs.new_zeros(batch_size, 1, dim), nothing)
        real = history.mask
        if real is None:
            real = torch.ones(history.items.shape[:2], dtype=torch.bool, device=inputs.device)
        stars = torch.zeros_like(real, dtype=torch.long)
        if history.ratings is not None:
            stars = history.ratings.round().long().clamp(0, NUM_RATINGS - 1)
        x = self.norm_list(history.items + self.rating_embedding(stars))
        states, _ = gru_states(self.within_list, x, real)
        seen = torch.cat([x, states], dim=-1) * real.unsqueeze(-1)  # [B, H, 2 dim]
        mean = seen.sum(dim=1) / real.sum(dim=1).clamp(min=1).unsqueeze(-1)

        e = self.norm_set(inputs)
        candidates = torch.cat([e, self.within_set(e, padding_bias(mask, e.dtype))], dim=-1)  # [B, L, 2 dim]
        of_set, of_list = self.set_to_list(candidates, mask, seen, real)
        features = [of_set, of_list, e, mean.unsqueeze(1).expand(-1, length, -1)]
        return self.head(torch.cat(features, dim=-1)).squeeze(-1)
