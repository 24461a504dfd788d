"""Scores candidate lists with trained rerankers: used by the score and evaluate stages and by serving.

The item part of the input layer is computed for the whole catalogue when the scorer is built, the user part
once per row of `user_vectors`; what is left per list is a gather, the backbone and its head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers.base import ListHistory, Reranker
from dpo4rec_ray.rerankers.catalogue import Catalogue, Histories, dot_places

PLACES_PER_CHUNK = 2560  # activations of one chunk stay in a core's L2 cache; four times as many are slower
USERS_PER_CHUNK = 4096


@dataclass(frozen=True)
class UserParts:
    """What a scorer's models make of S users' vectors; computed once, it serves any number of lists."""

    standard: Tensor  # [S, D], see Catalogue.standardise_users
    sides: tuple[Tensor | None, ...]  # per model [S, width]; None for a model without knowledge

    def __len__(self) -> int:
        return len(self.standard)


class ListScorer:
    """A plain callable: lists in, scores out. Holds no state between calls, so threads may share it."""

    def __init__(self, models: Sequence[Reranker], catalogue: Catalogue) -> None:
        """
        Args:
            models: trained rerankers of this catalogue, all on one device; their logits are averaged.
            catalogue: the items, on any device.
        """
        if not models:
            raise UserError("ListScorer needs at least one reranker")
        self.models = list(models)
        self.device = next(self.models[0].parameters()).device
        self.catalogue = catalogue.to(self.device)
        self.knowledge = any(model.knowledge for model in self.models)
        items = torch.arange(catalogue.shape.num_items, device=self.device)
        features = (items, self.catalogue.attribute_ids, self.catalogue.item_vectors)
        with torch.inference_mode():
            self._item_sides = [model.eval().embedding.item_side(*features) for model in self.models]

    @torch.inference_mode()
    def user_parts(self, user_vectors: np.ndarray | Tensor) -> UserParts:
        """user_vectors: [S, D]; zeros for a user without a text."""
        vectors = torch.as_tensor(user_vectors).to(self.device, torch.float32)
        parts = vectors.split(USERS_PER_CHUNK)
        return UserParts(
            torch.cat([self.catalogue.standardise_users(part) for part in parts]),
            tuple(
                torch.cat([model.embedding.user_side(part) for part in parts]) if model.knowledge else None
                for model in self.models
            ),
        )

    @torch.inference_mode()
    def score(
        self,
        item_ids: np.ndarray | Tensor,
        mask: np.ndarray | Tensor | None = None,
        user_vectors: np.ndarray | Tensor | UserParts | None = None,
        user_rows: np.ndarray | Tensor | None = None,
        histories: Histories | None = None,
    ) -> np.ndarray:
        """Mean logit over the models, float32 [B, L], -inf at padding.

        Args:
            item_ids: [B, L]; any valid id at padding.
            mask: [B, L] bool, True is a real candidate; None: every place is.
            user_vectors: [S, D] of samples or users, or their `user_parts`; needed if a model uses knowledge,
                ignored otherwise.
            user_rows: [B] row of each list in user_vectors; None: list i has row i (S = B). Fastest when
                lists with the same row are neighbours.
            histories: of the B lists; read by the backbones that use them. None: they are empty.

        Raises:
            UserError: ids outside the catalogue, rows that do not fit, or missing or misshapen vectors.
        """
        ids = torch.as_tensor(item_ids).to(self.device, torch.long)
        self.catalogue.check_ids(ids)
        real = None if mask is None else torch.as_tensor(mask).to(self.device, torch.bool)
        if real is not None and bool(real.all()):
            real = None  # attention without a mask is faster
        num_lists, length = ids.shape
        known, rows = None, None
        if self.knowledge:
            if user_vectors is None:
                raise UserError(
                    "this reranker uses knowledge: pass user_vectors (zeros for a user without a text)"
                )
            rows = self._check_rows(user_rows, len(user_vectors), num_lists)
            known = user_vectors if isinstance(user_vectors, UserParts) else self.user_parts(user_vectors)
        user_sides = [None] * len(self.models) if known is None else known.sides
        if histories is not None and any(model.uses_history for model in self.models):
            histories = histories.to(self.device)
            self.catalogue.check_ids(histories.item_ids)
        scores = torch.zeros(num_lists, length, device=self.device)
        step = max(1, PLACES_PER_CHUNK // max(length, 1))
        for start in range(0, num_lists, step):
            part = slice(start, start + step)
            chunk_rows = similarity = None
            if rows is not None:
                assert known is not None and self.catalogue.directions is not None
                chunk_rows = rows[part]
                distinct, places = torch.unique(chunk_rows, return_inverse=True)
                similarity = dot_places(
                    known.standard[distinct], places, self.catalogue.directions, ids[part]
                )
            chunk_mask = None if real is None else real[part]
            for model, items, users in zip(self.models, self._item_sides, user_sides, strict=True):
                inputs = model.embedding.combine(items, ids[part], users, chunk_rows, similarity)
                if model.uses_history and histories is not None:
                    seen = histories.select(part)
                    history = ListHistory(F.embedding(seen.item_ids, items), seen.mask, seen.ratings)
                    scores[part] += model.rank(inputs, chunk_mask, history)
                else:
                    scores[part] += model.rank(inputs, chunk_mask)
        scores /= len(self.models)
        if real is not None:
            scores.masked_fill_(~real, float("-inf"))
        return scores.cpu().numpy()

    __call__ = score

    def _check_rows(self, user_rows: np.ndarray | Tensor | None, num_users: int, num_lists: int) -> Tensor:
        if user_rows is None:
            rows = torch.arange(num_lists, device=self.device)
        else:
            rows = torch.as_tensor(user_rows).to(self.device, torch.long)
        fits = len(rows) == num_lists and (
            not num_lists or 0 <= int(rows.min()) <= int(rows.max()) < num_users
        )
        if not fits:
            raise UserError(
                f"{num_lists} lists with {len(rows)} user rows do not fit {num_users} user vectors; "
                "pass one row number per list, or one vector per list and no rows"
            )
        return rows
