"""Knowledge adapters: turn a user's and an item's text vector into two short vectors a reranker can use.

`hea` follows the hybrid-expert adaptor of KAR (arXiv 2306.10933): each side mixes experts that both sides share with
experts of its own, weighted by a gate of that side. `moe` and `mlp` are what KAR compares it with: one mixture of experts,
or one perceptron, for both sides. All three have the same size, so that only their structure is compared. Two differences
from KAR change the speed only: the experts of a side run as one matrix product instead of one module each, and each side
is a method of its own (`item_side`, `user_side`), so that the caller can run it once per distinct item and once per
distinct user instead of once per candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpo4rec_ray.config.ranking import RerankerArchitecture
from dpo4rec_ray.errors import UserError


class Experts(nn.Module):
    """`num_experts` two-layer perceptrons, ReLU after both layers (as KAR), evaluated together."""

    def __init__(self, num_experts: int, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(torch.empty(num_experts, hidden_dim, in_dim))
        self.bias_in = nn.Parameter(torch.zeros(num_experts, hidden_dim))
        self.weight_out = nn.Parameter(torch.empty(num_experts, out_dim, hidden_dim))
        self.bias_out = nn.Parameter(torch.zeros(num_experts, out_dim))
        # Expert by expert: xavier would take the first axis of the stacked tensor for the number of outputs.
        for stacked in (self.weight_in, self.weight_out):
            for weight in stacked:
                nn.init.xavier_normal_(weight)

    def forward(self, vectors: Tensor) -> Tensor:
        """vectors: [M, D] -> [experts, M, out]."""
        num_experts, hidden_dim, in_dim = self.weight_in.shape
        hidden = F.linear(vectors, self.weight_in.view(-1, in_dim), self.bias_in.view(-1)).relu_()
        hidden = hidden.view(-1, num_experts, hidden_dim).transpose(0, 1)
        return torch.baddbmm(self.bias_out.unsqueeze(1), hidden, self.weight_out.transpose(1, 2)).relu_()


def mix(outputs: Tensor, gate: Tensor) -> Tensor:
    """sum_e softmax(gate)_e * outputs_e. outputs [experts, M, out], gate [M, experts] -> [M, out]."""
    return (outputs * gate.softmax(dim=-1).t().unsqueeze(-1)).sum(dim=0)


def total_experts(architecture: RerankerArchitecture) -> int:
    """Experts of `hea`: those that both sides share, and those of either side."""
    return architecture.num_shared_experts + 2 * architecture.num_dedicated_experts


class KnowledgeAdapter(nn.Module):
    """The contract of an adapter; `out` is `architecture.adapter_dim`."""

    def __init__(self, vector_dim: int, architecture: RerankerArchitecture) -> None:
        super().__init__()

    def user_side(self, vectors: Tensor) -> Tensor:
        """vectors: [S, D] -> [S, out]."""
        raise NotImplementedError

    def item_side(self, vectors: Tensor) -> Tensor:
        """vectors: [M, D] -> [M, out]."""
        raise NotImplementedError


class HybridExpertAdapter(KnowledgeAdapter):
    """out = sum_e softmax(gate(x))_e * expert_e(x), e over the shared experts and the side's own."""

    def __init__(self, vector_dim: int, architecture: RerankerArchitecture) -> None:
        super().__init__(vector_dim, architecture)
        num_shared, num_dedicated = architecture.num_shared_experts, architecture.num_dedicated_experts
        dims = vector_dim, architecture.expert_hidden_dim, architecture.adapter_dim
        self.shared = Experts(num_shared, *dims)
        self.user_experts = Experts(num_dedicated, *dims)
        self.item_experts = Experts(num_dedicated, *dims)
        self.user_gate = nn.Linear(vector_dim, num_shared + num_dedicated)
        self.item_gate = nn.Linear(vector_dim, num_shared + num_dedicated)

    def user_side(self, vectors: Tensor) -> Tensor:
        """vectors: [S, D] -> [S, out]."""
        outputs = torch.cat([self.shared(vectors), self.user_experts(vectors)])  # [experts, S, out]
        return mix(outputs, self.user_gate(vectors))

    def item_side(self, vectors: Tensor) -> Tensor:
        """vectors: [M, D] -> [M, out]."""
        outputs = torch.cat([self.shared(vectors), self.item_experts(vectors)])
        return mix(outputs, self.item_gate(vectors))


class MixtureAdapter(KnowledgeAdapter):
    """One mixture of experts for both sides: as many experts as `hea` has in all, and one gate (KAR's MoE)."""

    def __init__(self, vector_dim: int, architecture: RerankerArchitecture) -> None:
        super().__init__(vector_dim, architecture)
        num_experts = total_experts(architecture)
        self.experts = Experts(
            num_experts, vector_dim, architecture.expert_hidden_dim, architecture.adapter_dim
        )
        self.gate = nn.Linear(vector_dim, num_experts)

    def user_side(self, vectors: Tensor) -> Tensor:
        """vectors: [S, D] -> [S, out]."""
        return mix(self.experts(vectors), self.gate(vectors))

    item_side = user_side


class PerceptronAdapter(KnowledgeAdapter):
    """One two-layer perceptron for both sides, as wide as all experts of `hea` side by side (KAR's MLP)."""

    def __init__(self, vector_dim: int, architecture: RerankerArchitecture) -> None:
        super().__init__(vector_dim, architecture)
        hidden_dim = total_experts(architecture) * architecture.expert_hidden_dim
        self.layers = Experts(1, vector_dim, hidden_dim, architecture.adapter_dim)

    def user_side(self, vectors: Tensor) -> Tensor:
        """vectors: [S, D] -> [S, out]."""
        return self.layers(vectors).squeeze(0)

    item_side = user_side


ADAPTERS: dict[str, type[KnowledgeAdapter]] = {
    "hea": HybridExpertAdapter,
    "moe": MixtureAdapter,
    "mlp": PerceptronAdapter,
}


def build_adapter(vector_dim: int, architecture: RerankerArchitecture) -> KnowledgeAdapter:
    """The adapter that `reranker.adapter` names, for vectors of `vector_dim` numbers. Raises UserError if it names none."""
    if architecture.adapter not in ADAPTERS:
        raise UserError(
            f"reranker.adapter = {architecture.adapter!r} is unknown; known: {', '.join(ADAPTERS)}"
        )
    return ADAPTERS[architecture.adapter](vector_dim, architecture)
