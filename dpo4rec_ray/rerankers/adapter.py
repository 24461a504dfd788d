"""Knowledge adapter: turns a user's and an item's text vector into two short vectors a reranker can use.

Follows the hybrid-expert adaptor of KAR (arXiv 2306.10933): every side mixes experts that both sides share
with experts of its own, weighted by a gate of that side. Two departures, both of speed only: the experts of a
side run as one matrix product instead of one module each, and a side is called on its own (`item_side`,
`user_side`), so that the caller can run it once per distinct item and once per distinct user instead of once
per candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Experts(nn.Module):
    """`num_experts` two-layer perceptrons, ReLU after both layers (as KAR), evaluated together."""

    def __init__(self, num_experts: int, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(torch.empty(num_experts, hidden_dim, in_dim))
        self.bias_in = nn.Parameter(torch.zeros(num_experts, hidden_dim))
        self.weight_out = nn.Parameter(torch.empty(num_experts, out_dim, hidden_dim))
        self.bias_out = nn.Parameter(torch.zeros(num_experts, out_dim))
        # Expert by expert: on the stacked tensor xavier would take the expert axis for a fan.
        for stacked in (self.weight_in, self.weight_out):
            for weight in stacked:
                nn.init.xavier_normal_(weight)

    def forward(self, vectors: Tensor) -> Tensor:
        """vectors: [M, D] -> [experts, M, out]."""
        num_experts, hidden_dim, in_dim = self.weight_in.shape
        hidden = F.linear(vectors, self.weight_in.view(-1, in_dim), self.bias_in.view(-1)).relu_()
        hidden = hidden.view(-1, num_experts, hidden_dim).transpose(0, 1)
        return torch.baddbmm(self.bias_out.unsqueeze(1), hidden, self.weight_out.transpose(1, 2)).relu_()


class HybridExpertAdapter(nn.Module):
    """out = sum_e softmax(gate(x))_e * expert_e(x), e over the shared experts and the side's own."""

    def __init__(
        self,
        vector_dim: int,
        out_dim: int = 32,
        *,
        num_shared: int = 2,
        num_dedicated: int = 5,
        hidden_dim: int = 128,
    ) -> None:
        super().__init__()
        self.shared = Experts(num_shared, vector_dim, hidden_dim, out_dim)
        self.user_experts = Experts(num_dedicated, vector_dim, hidden_dim, out_dim)
        self.item_experts = Experts(num_dedicated, vector_dim, hidden_dim, out_dim)
        self.user_gate = nn.Linear(vector_dim, num_shared + num_dedicated)
        self.item_gate = nn.Linear(vector_dim, num_shared + num_dedicated)

    def user_side(self, vectors: Tensor) -> Tensor:
        """vectors: [S, D] -> [S, out]."""
        return self._mix(vectors, self.user_experts, self.user_gate)

    def item_side(self, vectors: Tensor) -> Tensor:
        """vectors: [M, D] -> [M, out]."""
        return self._mix(vectors, self.item_experts, self.item_gate)

    def _mix(self, vectors: Tensor, dedicated: Experts, gate: nn.Linear) -> Tensor:
        outputs = torch.cat([self.shared(vectors), dedicated(vectors)])  # [experts, M, out]
        weights = gate(vectors).softmax(dim=-1)  # [M, experts]
        return (outputs * weights.t().unsqueeze(-1)).sum(dim=0)


ADAPTERS = {"hea": HybridExpertAdapter}
