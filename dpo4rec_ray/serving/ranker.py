"""Requests -> ranked candidates, on one published version: the plain class that a Serve replica holds.

What an engineer sends never fails: a user who is not known is ranked by the history that came along, an item that is not
known keeps its place behind those that are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dpo4rec_ray.published import UNKNOWN, PublishedVersion
from dpo4rec_ray.rerankers.catalogue import Catalogue, Histories
from dpo4rec_ray.rerankers.fit import load_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer

NEUTRAL_RATING = 3.0  # of an event that came without one


@dataclass(frozen=True)
class RankRequest:
    """One list to rank, in raw ids. ratings: beside history, oldest first."""

    candidates: Sequence[str]
    user_id: str = ""
    history: Sequence[str] | None = None  # None: the user's own, as published
    ratings: Sequence[float] = ()
    vector: npt.NDArray[np.float32] | None = None  # knowledge of a user whom the version does not know


@dataclass(frozen=True)
class Ranking:
    """order: [n] places of the candidates, best first, those that are not known last in the order they came in;
    scores: [n] logits in the order of the candidates, NaN for those that are not known."""

    order: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    knowledge: str  # "stored", "fresh" or "none"
    known_user: bool


class Ranker:
    """A version's reranker with its users' knowledge. Holds no state between calls, so threads may share it."""

    def __init__(self, version: PublishedVersion, device: str = "cpu"):
        """Raises UserError if the files do not fit each other."""
        self.version = version
        attributes = version.items["attributes"].to_pylist()
        catalogue = Catalogue.from_items(attributes, version.item_vectors)
        model = load_reranker(version.folder / "reranker", catalogue).to(torch.device(device))
        self._scorer = ListScorer([model], catalogue)
        self._uses_history = model.uses_history

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """All in one forward pass of the reranker."""
        sizes = np.array([len(request.candidates) for request in requests])
        flat = self.version.item_index.rows([item for request in requests for item in request.candidates])
        real = np.arange(sizes.max(initial=0)) < sizes[:, None]
        ids = np.zeros(real.shape, np.int64)
        ids[real] = flat
        known = real & (ids != UNKNOWN)
        ids[~known] = 0
        users = self.version.user_index.rows([request.user_id for request in requests])
        users[[not request.user_id for request in requests]] = UNKNOWN
        vectors, stored = self._vectors(requests, users)
        histories = self._histories(requests, users) if self._uses_history else None
        scores = self._scorer.score(ids, known, vectors, None, histories)
        keys = np.where(known, -scores, np.inf)
        order = np.argsort(keys, axis=1, kind="stable")  # equal scores, and the unknown, stay as they came
        scores = np.where(known, scores, np.nan)
        return [
            Ranking(
                order[row][real[row][order[row]]],
                scores[row, : sizes[row]],
                _source(request, bool(stored[row])),
                bool(users[row] != UNKNOWN),
            )
            for row, request in enumerate(requests)
        ]

    def _vectors(
        self, requests: Sequence[RankRequest], users: npt.NDArray[np.int64]
    ) -> tuple[np.ndarray | None, npt.NDArray[np.bool_]]:
        """[n, D] knowledge of the requests' users, and whose was stored [n]."""
        if not self.version.card.knowledge:
            return None, np.zeros(len(requests), np.bool_)
        vectors, stored = self.version.user_vectors(users)
        for row, request in enumerate(requests):
            if request.vector is not None and not stored[row]:
                vectors[row] = request.vector
        return vectors, stored

    def _histories(self, requests: Sequence[RankRequest], users: npt.NDArray[np.int64]) -> Histories:
        found: list[tuple[list[int], list[float]]] = []
        for request, user in zip(requests, users.tolist(), strict=True):
            if request.history is not None:
                rows = self.version.item_index.rows(list(request.history))
                ratings = list(request.ratings) or [NEUTRAL_RATING] * len(rows)
                kept = rows != UNKNOWN
                found.append((rows[kept].tolist(), np.array(ratings, np.float32)[kept].tolist()))
            else:
                found.append(([], []) if user == UNKNOWN else self.version.history(user))
        longest = max((len(items) for items, _ in found), default=0)
        mask = np.arange(longest) < np.array([len(items) for items, _ in found])[:, None]
        items, ratings = np.zeros(mask.shape, np.int64), np.zeros(mask.shape, np.float32)
        items[mask] = [item for own, _ in found for item in own]
        ratings[mask] = [rating for _, own in found for rating in own]
        return Histories(torch.from_numpy(items), torch.from_numpy(mask), torch.from_numpy(ratings))


def _source(request: RankRequest, stored: bool) -> str:
    if stored:
        return "stored"
    return "none" if request.vector is None else "fresh"
