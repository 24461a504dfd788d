"""Scores candidate lists with trained rerankers: used by the stages score and evaluate, and by serving.

The item part of the input layer is computed once for the whole catalogue when the scorer is built, and the user part once
per row of `user_vectors`. For each list, only the backbone and its head remain to be computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers.base import NO_VECTORS, Reranker
from dpo4rec_ray.rerankers.catalogue import Catalogue, Histories, dot_places, tensor_of

PLACES_PER_CHUNK = 2560  # the activations of one chunk fit a core's L2 cache; four times as many are slower
USERS_PER_CHUNK = 4096


@dataclass(frozen=True)
class UserParts:
    """The user part of S users for every model of a scorer: computed once, used for any number of lists."""

    standard: Tensor  # [S, D], see Catalogue.standardise_users
    sides: tuple[Tensor | None, ...]  # per model [S, width]; None for a model without knowledge

    def __len__(self) -> int:
        return len(self.standard)

    def select(self, part: slice) -> UserParts:
        """The parts of some of the users."""
        return UserParts(
            self.standard[part], tuple(None if side is None else side[part] for side in self.sides)
        )


class ListScorer:
    """Lists in, scores out. Keeps no state between calls, so threads may share it."""

    def __init__(self, models: Sequence[Reranker], catalogue: Catalogue) -> None:
        """
        Args:
            models: trained rerankers of this catalogue, all on one device; their logits are averaged.
            catalogue: the items, on any device.
        """
        if not models:
            raise UserError("ListScorer got no reranker; pass at least one")
        self.models = list(models)
        self.device = next(self.models[0].parameters()).device
        self.catalogue = catalogue.to(self.device)
        self.knowledge = any(model.knowledge for model in self.models)
        items = torch.arange(catalogue.shape.num_items, device=self.device)
        features = (items, self.catalogue.attribute_ids, self.catalogue.item_vectors)
        with torch.inference_mode():
            self._item_sides = [model.eval().item_side(*features) for model in self.models]

    @torch.inference_mode()
    def user_parts(self, user_vectors: np.ndarray | Tensor) -> UserParts:
        """user_vectors: [S, D]; zeros for a user without a text."""
        vectors = tensor_of(user_vectors).to(self.device, torch.float32)
        parts = vectors.split(USERS_PER_CHUNK)
        return UserParts(
            torch.cat([self.catalogue.standardise_users(part) for part in parts]),
            tuple(
                torch.cat([model.user_side(part) for part in parts]) if model.knowledge else None
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
            mask: [B, L] bool, True is a real candidate; None: all are.
            user_vectors: [S, D] of samples or users, or their `user_parts`; needed if a model uses knowledge,
                ignored otherwise.
            user_rows: [B] row of each list in user_vectors, fastest when lists with the same row are neighbours;
                None: list i has row i (S = B).
            histories: of the B lists, for the backbones that use them. None: they are empty.

        Raises:
            UserError: ids outside the catalogue, rows that do not fit the vectors, vectors that are missing or too short.
        """
        ids = tensor_of(item_ids).to(self.device, torch.long)
        self.catalogue.check_ids(ids)
        real = None if mask is None else tensor_of(mask).to(self.device, torch.bool)
        if real is not None and bool(real.all()):
            real = None  # attention without a mask is faster
        num_lists = len(ids)
        known, rows = None, None
        if self.knowledge:
            if user_vectors is None:
                raise UserError(NO_VECTORS)
            rows = self._check_rows(user_rows, len(user_vectors), num_lists)
            known = user_vectors if isinstance(user_vectors, UserParts) else self.user_parts(user_vectors)
        if histories is not None and any(model.uses_history for model in self.models):
            histories = histories.to(self.device)
            self.catalogue.check_ids(histories.item_ids)
        return self._scores(ids, real, known, rows, histories).cpu().numpy()

    @torch.inference_mode()
    def score_aligned(
        self, item_ids: Tensor, mask: Tensor | None, users: UserParts | None, histories: Histories | None
    ) -> Tensor:
        """`score` without its checks, which cost as much as the ranking when there is one list.

        The caller must know that list i is of user i, that all ids are in the catalogue, that a mask has padding in it,
        and that all tensors are on the scorer's device.
        """
        return self._scores(item_ids, mask, users, None, histories)

    def _scores(
        self,
        ids: Tensor,
        real: Tensor | None,
        users: UserParts | None,
        rows: Tensor | None,
        histories: Histories | None,
    ) -> Tensor:
        """[B, L], -inf where `real` is False. Lists that do not fit one chunk are scored chunk by chunk."""
        num_lists, length = ids.shape
        step = max(1, PLACES_PER_CHUNK // max(length, 1))
        if num_lists > step:
            parts = [slice(start, start + step) for start in range(0, num_lists, step)]
            return torch.cat(
                [
                    self._scores(
                        ids[part],
                        None if real is None else real[part],
                        users.select(part) if users is not None and rows is None else users,
                        None if rows is None else rows[part],
                        None if histories is None else histories.select(part),
                    )
                    for part in parts
                ]
            )
        similarity = None
        if users is not None:
            assert self.catalogue.directions is not None
            standard, places = users.standard, None
            if rows is not None:
                distinct, places = torch.unique(rows, return_inverse=True)
                standard = standard[distinct]
            similarity = dot_places(standard, places, self.catalogue.directions, ids)
        sides = [None] * len(self.models) if users is None else users.sides
        logits = []
        for model, items, side in zip(self.models, self._item_sides, sides, strict=True):
            logits.append(model.logits(items, ids, side, rows, similarity, real, histories))
        scores = logits[0] if len(logits) == 1 else torch.stack(logits).mean(dim=0)
        return scores if real is None else scores.masked_fill_(~real, float("-inf"))

    def _check_rows(
        self, user_rows: np.ndarray | Tensor | None, num_users: int, num_lists: int
    ) -> Tensor | None:
        if user_rows is None:
            rows, fits = None, num_users == num_lists
        else:
            rows = tensor_of(user_rows).to(self.device, torch.long)
            fits = len(rows) == num_lists and (
                not num_lists or 0 <= int(rows.min()) <= int(rows.max()) < num_users
            )
        if not fits:
            raise UserError(
                f"{num_lists} lists do not fit {num_users} user vectors; pass one row number per list, "
                "or one vector per list and no rows"
            )
        return rows
