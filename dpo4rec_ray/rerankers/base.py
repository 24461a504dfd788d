"""What every backbone shares: the input layer, the scoring head and the Reranker contract.

A candidate's input is the concatenation [item id, facets, adapter(item), adapter(user), similarity]. The last three are
there with `knowledge = "input"` alone, the paper's way: otherwise knowledge is added behind the backbone (branches.py).
With `input_layer = "concat"` it is used as it is (the way of the paper and KAR, which have no similarity); with "linear", the
default and beyond the paper, it passes through one linear map. Both are computed as the sum of an item part, a user part
and a similarity part: the item part runs once per distinct item, the user part once per distinct user, and a scorer can
keep both in tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpo4rec_ray.config.ranking import RerankerArchitecture
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers.adapter import KnowledgeAdapter, build_adapter
from dpo4rec_ray.rerankers.branches import BRANCHES, KnowledgeBranch
from dpo4rec_ray.rerankers.catalogue import CatalogueShape, Histories, RerankBatch

HEAD_DIMS = (200, 80)  # KAR's final MLP
NO_VECTORS = "this reranker uses knowledge: pass user_vectors, with zeros for a user without a text"


@dataclass(frozen=True)
class ListHistory:
    """The histories of B lists as `Reranker.rank` takes them."""

    items: Tensor  # [B, H, width]: the item part of the input layer
    mask: Tensor | None = None  # [B, H] bool: True is a real item; None: all are
    ratings: Tensor | None = None  # [B, H] float; None: unknown

    @classmethod
    def of(cls, items: Tensor, histories: Histories | None) -> ListHistory | None:
        """items: [M, width], the rows that `histories.item_ids` name."""
        if histories is None:
            return None
        return cls(F.embedding(histories.item_ids, items), histories.mask, histories.ratings)


class ItemSide(NamedTuple):
    """What a model makes of M items before it sees a list."""

    inputs: Tensor  # [M, width]: the item part of the input layer
    branch: Tensor | None = None  # [M, .]: the item part of the branch


class ListEmbedding(nn.Module):
    """Input layer of a backbone: id, facets, knowledge and similarity of a candidate as `width` numbers.

    `width` is `hidden_dim` for the linear layer. For "concat" it is the number of features, rounded up to a multiple of
    `num_heads` so that attention can split them among its heads; zeros fill the rest.
    """

    facet_starts: Tensor

    def __init__(self, shape: CatalogueShape, knowledge: bool, architecture: RerankerArchitecture) -> None:
        """Raises UserError for an unknown adapter."""
        super().__init__()
        linear = architecture.input_layer == "linear"
        self.knowledge, self.similarity = knowledge, knowledge and architecture.similarity
        item_width = architecture.embed_dim * (1 + len(shape.facet_sizes))
        self.item_embedding = nn.Embedding(shape.num_items, architecture.embed_dim)
        # One table for all facets: row 0 of each facet's block is its missing value.
        self.facet_embedding = nn.Embedding(max(sum(shape.facet_sizes), 1), architecture.embed_dim)
        starts = torch.tensor([0, *shape.facet_sizes], dtype=torch.long).cumsum(0)[:-1]
        self.register_buffer("facet_starts", starts, persistent=False)
        self.adapter: KnowledgeAdapter | None = None
        self.item_projection: nn.Linear | None = None
        self.user_projection: nn.Linear | None = None
        self.similarity_projection: nn.Linear | None = None
        if knowledge:
            self.adapter = build_adapter(shape.vector_dim, architecture)
            item_width += architecture.adapter_dim
            if linear:
                self.user_projection = nn.Linear(
                    architecture.adapter_dim, architecture.hidden_dim, bias=False
                )
            if linear and architecture.similarity:
                self.similarity_projection = nn.Linear(1, architecture.hidden_dim, bias=False)
        if linear:
            self.width = architecture.hidden_dim
            self.item_projection = nn.Linear(item_width, self.width)
        # Where the user part and the similarity begin in the concatenation.
        self.user_start = item_width
        self.similarity_start = item_width + (architecture.adapter_dim if knowledge else 0)
        if not linear:
            num_features = self.similarity_start + self.similarity
            self.width = math.ceil(num_features / architecture.num_heads) * architecture.num_heads

    def item_side(self, item_ids: Tensor, attribute_ids: Tensor, item_vectors: Tensor | None) -> Tensor:
        """item_ids [M], attribute_ids [M, F], item_vectors [M, D] -> [M, width]."""
        facets = self.facet_embedding(attribute_ids + self.facet_starts).flatten(1)
        parts = [self.item_embedding(item_ids), facets]
        if self.adapter is not None:
            assert item_vectors is not None, "checked when the layer was built"
            parts.append(self.adapter.item_side(item_vectors))
        features = torch.cat(parts, dim=1)
        return self._placed(features, 0) if self.item_projection is None else self.item_projection(features)

    def user_side(self, user_vectors: Tensor) -> Tensor:
        """user_vectors [S, D] -> [S, width]. Only with knowledge."""
        assert self.adapter is not None
        features = self.adapter.user_side(user_vectors)
        if self.user_projection is None:
            return self._placed(features, self.user_start)
        return self.user_projection(features)

    def combine(
        self,
        items: Tensor,
        index: Tensor,
        users: Tensor | None,
        user_rows: Tensor | None,
        similarity: Tensor | None,
    ) -> Tensor:
        """Sum of the parts: items [M, width], users [S, width], similarity [B, L] -> [B, L, width].

        user_rows None: list b has row b of `users` (S = B).
        """
        # F.embedding instead of indexing: its backward pass is several times faster on CPU.
        inputs = F.embedding(index, items)
        if users is not None:
            own = users if user_rows is None else F.embedding(user_rows, users)
            inputs = inputs + own.unsqueeze(1)
        if self.similarity:
            assert similarity is not None
            feature = similarity.unsqueeze(-1)
            if self.similarity_projection is None:
                inputs = inputs + self._placed(feature, self.similarity_start)
            else:
                inputs = inputs + feature * self.similarity_projection.weight.view(-1)
        return inputs

    def _placed(self, features: Tensor, start: int) -> Tensor:
        """features [..., n] as the columns from `start` of zeros [..., width]."""
        return F.pad(features, (start, self.width - start - features.shape[-1]))


def score_head(in_dim: int) -> nn.Sequential:
    """KAR's final MLP: [..., in_dim] -> one logit [..., 1]."""
    return nn.Sequential(
        nn.Linear(in_dim, HEAD_DIMS[0]),
        nn.ReLU(inplace=True),
        nn.Linear(HEAD_DIMS[0], HEAD_DIMS[1]),
        nn.ReLU(inplace=True),
        nn.Linear(HEAD_DIMS[1], 1),
    )


class Reranker(nn.Module):
    """A backbone. A subclass writes `rank` and sets the three values below; test_contract.py checks what they promise."""

    # The training loss: a key of core.losses.RANKING_LOSSES.
    loss = "pointwise_bce"
    # False: permuting the candidates permutes the scores and changes none of them.
    order_matters = True
    # True: `rank` reads the histories, and works without them.
    uses_history = False

    def __init__(self, shape: CatalogueShape, knowledge: bool, architecture: RerankerArchitecture) -> None:
        """Raises UserError for an unknown adapter or way of knowledge, or for knowledge without item vectors."""
        super().__init__()
        self.shape, self.knowledge, self.architecture = shape, knowledge, architecture
        if knowledge and not shape.vector_dim:
            raise UserError(
                "a reranker with knowledge needs item vectors, and the catalogue has none; run the stage encode"
            )
        self.embedding = ListEmbedding(shape, knowledge and architecture.knowledge == "input", architecture)
        self.branch: KnowledgeBranch | None = None

    def add_branch(self) -> None:
        """Build the branch behind the fitted backbone; nothing without knowledge, or where that enters the input layer."""
        if self.knowledge and self.architecture.knowledge != "input":
            self.branch = BRANCHES[self.architecture.knowledge](self.shape, self.architecture)

    def init_weights(self) -> None:
        """Xavier-normal for linear and embedding weights, zero biases (KAR); `build_reranker` calls it."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.xavier_normal_(module.weight)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def rank(self, inputs: Tensor, mask: Tensor | None, history: ListHistory | None = None) -> Tensor:
        """inputs [B, L, width], mask [B, L] or None -> finite logits [B, L]. Padding must not change a score."""
        raise NotImplementedError

    def item_side(self, item_ids: Tensor, attribute_ids: Tensor, item_vectors: Tensor | None) -> ItemSide:
        """item_ids [M], attribute_ids [M, F], item_vectors [M, D] -> what the model makes of M items."""
        inputs = self.embedding.item_side(item_ids, attribute_ids, item_vectors)
        if self.branch is None:
            return ItemSide(inputs)
        assert item_vectors is not None, "checked when the model was built"
        return ItemSide(inputs, self.branch.item_side(item_ids, item_vectors))

    def user_side(self, user_vectors: Tensor) -> Tensor:
        """user_vectors [S, D] -> [S, any width]. Only with knowledge."""
        return (self.embedding if self.branch is None else self.branch).user_side(user_vectors)

    def logits(
        self,
        items: ItemSide,
        index: Tensor,
        users: Tensor | None,
        user_rows: Tensor | None,
        similarity: Tensor | None,
        mask: Tensor | None,
        histories: Histories | None,
    ) -> Tensor:
        """Logits [B, L] from the sides: index [B, L] rows of `items`, users [S, .] of `user_side`, user_rows [B] (None: list b
        has row b), similarity and mask [B, L], histories with rows of `items`."""
        history = ListHistory.of(items.inputs, histories)
        if self.branch is None:
            inputs = self.embedding.combine(items.inputs, index, users, user_rows, similarity)
            return self.rank(inputs, mask, history)
        assert items.branch is not None and users is not None and similarity is not None
        inputs = self.embedding.combine(items.inputs, index, None, None, None)
        added = self.branch.logits(items.branch, index, users, user_rows, similarity)
        return self.rank(inputs, mask, history) + added

    def forward(self, batch: RerankBatch) -> Tensor:
        """Logits [B, L], finite everywhere (meaningless at padding). A batch without histories is one of empty histories."""
        users = None
        if self.knowledge:
            if batch.user_vectors is None:
                raise UserError(NO_VECTORS)
            users = self.user_side(batch.user_vectors)
        items = self.item_side(batch.item_ids, batch.attribute_ids, batch.item_vectors)
        return self.logits(
            items, batch.index, users, batch.user_rows, batch.similarity, batch.mask, batch.histories
        )

    def score(self, batch: RerankBatch) -> Tensor:
        """Logits [B, L] with -inf at padding, so that padding is always ranked last."""
        logits = self(batch)
        return logits if batch.mask is None else logits.masked_fill(~batch.mask, float("-inf"))
