"""The item catalogue as tensors, and candidate lists as a batch over it.

Departs from KAR's loader, which copies an item's vector into every list it is in: a batch holds each distinct
item and user once, so the costly side networks run once per distinct row. The similarity feature (method.md
section 3, beyond the paper) is made here because it needs no weights: the cosine of the raw user and item
vectors, standardised per user over the whole catalogue. Raw cosines of sentence vectors sit in a narrow band
around a user's own mean, too little signal for a freshly initialised layer to find in small data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dpo4rec_ray.errors import UserError

# One entry of the product of all distinct users with all distinct items costs about this many times less than
# gathering the two vectors of one place and multiplying them (measured on one CPU thread, 384-d).
GATHER_COST = 64


@dataclass(frozen=True)
class CatalogueShape:
    """What a reranker's weights depend on: two catalogues of the same shape can use the same weights."""

    num_items: int
    facet_sizes: tuple[int, ...]  # values per facet, the missing value included
    vector_dim: int  # D; 0: the items have no vectors
    vocabulary: str  # hash of the facets' values in order


@dataclass(frozen=True)
class Histories:
    """What the users of n lists had seen before them, oldest first, padded to the longest."""

    item_ids: Tensor  # [n, H] int64, 0 at padding
    mask: Tensor  # [n, H] bool: True is a real item
    ratings: Tensor  # [n, H] float32, 0 at padding

    def select(self, index: Tensor | slice) -> Histories:
        """Those of the lists at `index`."""
        return Histories(self.item_ids[index], self.mask[index], self.ratings[index])

    def to(self, device: torch.device | str) -> Histories:
        """The same histories on `device`."""
        return Histories(self.item_ids.to(device), self.mask.to(device), self.ratings.to(device))


@dataclass(frozen=True)
class RerankBatch:
    """B lists over tables of the M distinct items and S distinct users in them; made by `Catalogue.batch`."""

    index: Tensor  # [B, L] long: row of each candidate in the item tables; any row at padding
    mask: Tensor | None  # [B, L] bool: True is a real candidate; None: every place is
    item_ids: Tensor  # [M] long
    attribute_ids: Tensor  # [M, F] long
    item_vectors: Tensor | None = None  # [M, D] float32
    user_vectors: Tensor | None = None  # [S, D] float32
    user_rows: Tensor | None = None  # [B] long: row of each list in user_vectors
    similarity: Tensor | None = None  # [B, L] standardised cosine


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
            attributes: per item_id its "facet: value" strings; of several values of a facet the first counts.
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
                    raise UserError(f"items: attribute {text!r} of item_id {item_id} is not 'facet: value'")
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
        if isinstance(item_vectors, np.ndarray) and not item_vectors.flags.writeable:
            item_vectors = (
                item_vectors.copy()
            )  # of a mapped file or an Arrow column: torch warns of sharing these
        vectors = torch.as_tensor(item_vectors).to(torch.float32)
        if vectors.ndim != 2 or len(vectors) != len(per_item):
            raise UserError(
                f"item vectors have shape {tuple(vectors.shape)} but there are {len(per_item)} items; "
                "encode the items again"
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
        tensors = ("attribute_ids", "item_vectors", "directions", "covariance")
        moved = {
            name: None if (value := getattr(self, name)) is None else value.to(device) for name in tensors
        }
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

        For a unit vector u and unit item vectors v with mean m and covariance C, cos - mean(cos) = u.(v - m)
        and var(cos) = u C u, both over the whole catalogue, so z = u.(v - m) / sqrt(u C u). A zero vector
        stays zero: such a user is neutral to every item.

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
    ) -> RerankBatch:
        """Lists as a batch.

        Args:
            item_ids: [B, L] long; any valid id at padding.
            mask: [B, L] bool, True is a real candidate; None: every place is.
            user_vectors: [S, D] float32, or None without knowledge.
            user_rows: [B] long, each list's row in user_vectors; None: list i has row i (S = B).
        """
        distinct, index = torch.unique(item_ids, return_inverse=True)
        batch = RerankBatch(index, mask, distinct, self.attribute_ids[distinct])
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
            item_vectors=self.item_vectors[distinct],
            user_vectors=user_vectors,
            user_rows=user_rows,
            similarity=dot_places(users, user_rows, self.directions[distinct], index),
        )


def dot_places(users: Tensor, user_rows: Tensor | None, items: Tensor, index: Tensor) -> Tensor:
    """users[user_rows[b]] . items[index[b, l]]. users [S, D], items [M, D], index [B, L] -> [B, L].

    user_rows None: list b has row b (S = B).
    """
    if user_rows is not None and len(users) * len(items) <= GATHER_COST * index.numel():
        table = users @ items.t()
        return table.flatten()[user_rows.unsqueeze(1) * len(items) + index]
    own = users if user_rows is None else users[user_rows]
    return torch.bmm(F.embedding(index, items), own.unsqueeze(-1)).squeeze(-1)
