"""The item catalogue as tensors, and candidate lists as a batch over it.

KAR's loader copies an item's vector into every list that the item is in. Here a batch holds each distinct item and user
once, so that the costly side networks run once per distinct row.

The similarity (docs/method.md section 3, beyond the paper) is computed here because it has no weights: the cosine of the
user's and the item's text vector, standardised per user over the whole catalogue. Without that, the cosines of sentence
vectors differ too little around each user's mean for a new layer to learn from them on small data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dpo4rec_ray.errors import UserError

# The product of all users with all items, in the cost of gathering the two vectors of one place and multiplying them
# (measured on one CPU thread with vectors of 384 numbers): each item is read once, and multiplied with each user.
READ_COST, MULTIPLY_COST = 1 / 4, 1 / 36


def tensor_of(values: np.ndarray | Tensor) -> Tensor:
    """The values as a tensor. Shares memory, unless the array is read-only as those of Arrow, mapped files and Ray are:
    torch has no read-only tensors."""
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        values = values.copy()
    return torch.as_tensor(values)


@dataclass(frozen=True)
class TensorRows:
    """Parent of the dataclasses whose fields are tensors with one row per list, other `TensorRows`, or None."""

    def select(self, index: Tensor | slice) -> Self:
        """The rows at `index`: positions, a boolean mask, or a slice such as [rank::world_size]."""
        return self._each(lambda column: column[index])

    def to(self, device: torch.device | str) -> Self:
        """The same rows on `device`."""
        return self._each(lambda column: column.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed = {
            name: value._each(change) if isinstance(value, TensorRows) else change(value)
            for name, value in vars(self).items()
            if value is not None
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class CatalogueShape:
    """What a reranker's weights depend on: catalogues of the same shape can use the same weights."""

    num_items: int
    facet_sizes: tuple[int, ...]  # values per facet, the missing value included
    vector_dim: int  # D; 0: the items have no vectors
    vocabulary: str  # hash of the facets' values in order


@dataclass(frozen=True)
class Histories(TensorRows):
    """What the users of n lists saw before them, oldest first, padded to the longest."""

    item_ids: Tensor  # [n, H] int64; any valid id at padding
    mask: Tensor | None = None  # [n, H] bool: True is a real item; None: all are
    ratings: Tensor | None = None  # [n, H] float32; None: unknown


@dataclass(frozen=True)
class RerankBatch:
    """B lists over tables of their M items and S distinct users; made by `Catalogue.batch`.

    The items of the histories follow the candidates in the tables, so that each is embedded once. An item that is a
    candidate and in a history has two rows, which costs less than finding it.
    """

    index: Tensor  # [B, L] long: row of each candidate in the item tables; any row at padding
    mask: Tensor | None  # [B, L] bool: True is a real candidate; None: all are
    item_ids: Tensor  # [M] long
    attribute_ids: Tensor  # [M, F] long
    item_vectors: Tensor | None = None  # [M, D] float32
    user_vectors: Tensor | None = None  # [S, D] float32
    user_rows: Tensor | None = None  # [B] long: row of each list in user_vectors
    similarity: Tensor | None = None  # [B, L] standardised cosine
    histories: Histories | None = None  # its item_ids are rows in the item tables


@dataclass(frozen=True)
class Catalogue:
    """All items of a run as tensors, indexed by item_id."""

    shape: CatalogueShape
    attribute_ids: Tensor  # [num_items, F] long, 0 = the item has no value for this facet
    item_vectors: Tensor | None  # [num_items, D] float32
    directions: Tensor | None  # [num_items, D]: unit vector minus the mean; 0: no vector
    covariance: Tensor | None  # [D, D] of the directions

    @classmethod
    def from_items(
        cls, attributes: Sequence[Sequence[str]], item_vectors: np.ndarray | Tensor | None = None
    ) -> Catalogue:
        """Build the catalogue.

        Args:
            attributes: of each item_id its "facet: value" strings; the first value of a facet is used.
            item_vectors: [num_items, D], any float type; None without knowledge.

        Raises:
            UserError: an attribute is not of the form "facet: value", or the vectors do not fit the items.
        """
        per_item = []
        for item_id, strings in enumerate(attributes):
            values: dict[str, str] = {}
            for text in strings:
                facet, separator, value = text.partition(": ")
                if not separator:
                    raise UserError(
                        f"items: attribute {text!r} of item_id {item_id} is not of the form 'facet: value'"
                    )
                values.setdefault(facet, value)
            per_item.append(values)
        facets = sorted({facet for values in per_item for facet in values})
        vocabularies = [sorted({values[facet] for values in per_item if facet in values}) for facet in facets]
        attribute_ids = torch.zeros(len(per_item), len(facets), dtype=torch.long)
        for column, (facet, vocabulary) in enumerate(zip(facets, vocabularies, strict=True)):
            code = {value: position + 1 for position, value in enumerate(vocabulary)}
            attribute_ids[:, column] = torch.tensor([code.get(values.get(facet), 0) for values in per_item])
        digest = hashlib.sha256(json.dumps([facets, vocabularies]).encode()).hexdigest()[:16]
        shape = CatalogueShape(len(per_item), tuple(len(v) + 1 for v in vocabularies), 0, digest)
        if item_vectors is None:
            return cls(shape, attribute_ids, None, None, None)
        vectors = tensor_of(item_vectors).to(torch.float32)
        if vectors.ndim != 2 or len(vectors) != len(per_item):
            raise UserError(
                f"item vectors have shape {tuple(vectors.shape)}, but there are {len(per_item)} items; "
                "run the stage encode again"
            )
        known = vectors.norm(dim=1, keepdim=True) > 0
        unit = F.normalize(vectors, dim=1)
        directions = (unit - unit.sum(dim=0) / known.sum().clamp(min=1)) * known
        covariance = directions.t() @ directions / known.sum().clamp(min=1)
        return cls(
            replace(shape, vector_dim=vectors.shape[1]), attribute_ids, vectors, directions, covariance
        )

    def to(self, device: torch.device | str) -> Catalogue:
        """The same catalogue with its tensors on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def check_ids(self, item_ids: Tensor) -> None:
        """Raises UserError if an id (padding included) is not an item of this catalogue."""
        if item_ids.numel() and not 0 <= int(item_ids.min()) <= int(item_ids.max()) < self.shape.num_items:
            worst = int(item_ids.min()) if int(item_ids.min()) < 0 else int(item_ids.max())
            raise UserError(
                f"candidate item_id {worst} is not in the catalogue (0..{self.shape.num_items - 1}); "
                "pass the dense item_id of the items table, not the raw id"
            )

    def standardise_users(self, user_vectors: Tensor) -> Tensor:
        """Scale so that the dot product with `directions` is the standardised cosine. [S, D] -> [S, D].

        For a unit vector u and unit item vectors v with mean m and covariance C over the whole catalogue,
        cos - mean(cos) = u.(v - m) and var(cos) = u C u, so z = u.(v - m) / sqrt(u C u). A zero vector stays zero:
        all items have the similarity 0 for such a user.

        Raises:
            UserError: the widths of user and item vectors differ.
        """
        if self.covariance is None or user_vectors.shape[1] != self.shape.vector_dim:
            raise UserError(
                f"user vectors have width {user_vectors.shape[1]}, item vectors {self.shape.vector_dim}; "
                "both must come from the same text encoder"
            )
        unit = F.normalize(user_vectors, dim=1)
        variance = ((unit @ self.covariance) * unit).sum(dim=1, keepdim=True)
        return unit * variance.clamp(min=1e-8).rsqrt()

    def batch(
        self,
        item_ids: Tensor,
        mask: Tensor | None = None,
        user_vectors: Tensor | None = None,
        user_rows: Tensor | None = None,
        histories: Histories | None = None,
    ) -> RerankBatch:
        """Lists as a batch.

        Args:
            item_ids: [B, L] long; any valid id at padding.
            mask: [B, L] bool, True is a real candidate; None: all are.
            user_vectors: [S, D] float32, or None without knowledge.
            user_rows: [B] long, each list's row in user_vectors; None: list i has row i (S = B).
            histories: of the B lists, for the backbones that read them.
        """
        distinct, index = torch.unique(item_ids, return_inverse=True)
        items = distinct
        if histories is not None:
            seen, rows = torch.unique(histories.item_ids, return_inverse=True)
            items, histories = torch.cat([items, seen]), replace(histories, item_ids=rows + len(items))
        batch = RerankBatch(index, mask, items, self.attribute_ids[items], histories=histories)
        if user_vectors is None or self.item_vectors is None:
            return batch
        if user_rows is None:
            user_rows = torch.arange(len(item_ids), device=item_ids.device)
        else:
            rows, user_rows = torch.unique(user_rows, return_inverse=True)
            user_vectors = user_vectors[rows]
        users = self.standardise_users(user_vectors)
        return replace(
            batch,
            item_vectors=self.item_vectors[items],
            user_vectors=user_vectors,
            user_rows=user_rows,
            similarity=dot_places(users, user_rows, self.directions[distinct], index),
        )


def dot_places(users: Tensor, user_rows: Tensor | None, items: Tensor, index: Tensor) -> Tensor:
    """users[user_rows[b]] . items[index[b, l]]. users [S, D], items [M, D], index [B, L] -> [B, L].

    user_rows None: list b has row b (S = B).
    """
    if user_rows is not None and len(items) * (READ_COST + MULTIPLY_COST * len(users)) <= index.numel():
        table = users @ items.t()
        return table.flatten()[user_rows.unsqueeze(1) * len(items) + index]
    own = users if user_rows is None else users[user_rows]
    return torch.bmm(F.embedding(index, items), own.unsqueeze(-1)).squeeze(-1)
