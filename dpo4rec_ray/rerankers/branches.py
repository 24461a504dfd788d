"""What a text adds to the scores of a reranker that was fitted without it: zero until the branch is fitted.

Beyond the paper, whose knowledge enters the input layer (`reranker.knowledge = "input"`). There, texts cost NDCG on real data:
the network memorises users by their vectors before it has learnt to rank (docs/results.md). A branch leaves the fitted
backbone as it is:

    logit(list, user, item) = backbone(list) + branch(user's text, item)

so that a branch of zeros ranks exactly as the backbone, and texts that say nothing cannot do harm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpo4rec_ray.config.ranking import RerankerArchitecture
from dpo4rec_ray.rerankers.adapter import KnowledgeAdapter, build_adapter
from dpo4rec_ray.rerankers.catalogue import CatalogueShape, dot_places


class KnowledgeBranch(nn.Module):
    """The contract of a branch. Its item part runs once per distinct item, its user part once per distinct text."""

    def __init__(self, shape: CatalogueShape, architecture: RerankerArchitecture) -> None:
        super().__init__()

    def item_side(self, item_ids: Tensor, item_vectors: Tensor) -> Tensor:
        """item_ids [M], item_vectors [M, D] -> [M, width]."""
        raise NotImplementedError

    def user_side(self, user_vectors: Tensor) -> Tensor:
        """user_vectors [S, D] -> [S, width]; zeros for a zero vector, which is a user without a text."""
        raise NotImplementedError

    def logits(
        self, items: Tensor, index: Tensor, users: Tensor, user_rows: Tensor | None, similarity: Tensor
    ) -> Tensor:
        """items [M, width], index [B, L], users [S, width], user_rows [B] (None: list b has row b), similarity [B, L]
        -> what is added to the backbone's logits [B, L]."""
        raise NotImplementedError

    def erase(self) -> None:
        """Make the branch add zero from now on: the reranker ranks as its backbone."""
        raise NotImplementedError


class TextRegression(KnowledgeBranch):
    """logit += gate_1 * affinity + gate_2 * similarity: a linear map from a text's vector to a liking of each item.

    The map is the ridge regression of training users' likes on their texts' vectors, in closed form
    (rerankers/text_regression.py); `reranker.similarity = false` leaves the second term out. Has no trained weights.
    """

    mean: Tensor
    text_map: Tensor
    item_factors: Tensor
    gates: Tensor

    def __init__(self, shape: CatalogueShape, architecture: RerankerArchitecture) -> None:
        super().__init__(shape, architecture)
        rank = min(architecture.regression_rank, shape.vector_dim, shape.num_items)
        self.register_buffer(
            "mean", torch.zeros(shape.vector_dim)
        )  # of the unit vectors of training users' texts
        self.register_buffer("text_map", torch.zeros(shape.vector_dim, rank))
        self.register_buffer("item_factors", torch.zeros(shape.num_items, rank))
        self.register_buffer("gates", torch.zeros(2))

    def item_side(self, item_ids: Tensor, item_vectors: Tensor) -> Tensor:
        """As `KnowledgeBranch.item_side`; width is the rank of the regression."""
        return self.item_factors[item_ids]

    def user_side(self, user_vectors: Tensor) -> Tensor:
        """As `KnowledgeBranch.user_side`."""
        return ((F.normalize(user_vectors, dim=1) - self.mean) @ self.text_map) * _known(user_vectors)

    def logits(
        self, items: Tensor, index: Tensor, users: Tensor, user_rows: Tensor | None, similarity: Tensor
    ) -> Tensor:
        """As `KnowledgeBranch.logits`."""
        return self.gates[0] * dot_places(users, user_rows, items, index) + self.gates[1] * similarity

    def erase(self) -> None:
        """As `KnowledgeBranch.erase`."""
        self.gates.zero_()


class ResidualAdapter(KnowledgeBranch):
    """logit += W adapter(user) . adapter(item) + w * similarity, W and w zero at the start, trained by the list loss."""

    def __init__(self, shape: CatalogueShape, architecture: RerankerArchitecture) -> None:
        super().__init__(shape, architecture)
        self.adapter: KnowledgeAdapter = build_adapter(shape.vector_dim, architecture)
        self.user_projection = nn.Linear(architecture.adapter_dim, architecture.adapter_dim, bias=False)
        self.similarity_weight = nn.Parameter(torch.zeros(())) if architecture.similarity else None
        for module in self.adapter.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.user_projection.weight)

    def item_side(self, item_ids: Tensor, item_vectors: Tensor) -> Tensor:
        """As `KnowledgeBranch.item_side`; width is `adapter_dim`."""
        return self.adapter.item_side(item_vectors)

    def user_side(self, user_vectors: Tensor) -> Tensor:
        """As `KnowledgeBranch.user_side`."""
        return self.user_projection(self.adapter.user_side(user_vectors)) * _known(user_vectors)

    def logits(
        self, items: Tensor, index: Tensor, users: Tensor, user_rows: Tensor | None, similarity: Tensor
    ) -> Tensor:
        """As `KnowledgeBranch.logits`."""
        added = dot_places(users, user_rows, items, index)
        if self.similarity_weight is not None:
            added = added + self.similarity_weight * similarity
        return added

    def erase(self) -> None:
        """As `KnowledgeBranch.erase`."""
        with torch.no_grad():
            self.user_projection.weight.zero_()
            if self.similarity_weight is not None:
                self.similarity_weight.zero_()


def _known(user_vectors: Tensor) -> Tensor:
    """[S, 1]: whether there is a text."""
    return user_vectors.norm(dim=1, keepdim=True) > 0


# reranker.knowledge -> its branch. "input", the paper's way, has none.
BRANCHES: dict[str, type[KnowledgeBranch]] = {"regression": TextRegression, "residual": ResidualAdapter}
