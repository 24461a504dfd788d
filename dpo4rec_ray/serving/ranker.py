"""Requests -> ranked candidates, on one published version: the plain class that a Serve replica holds.

What an engineer sends never fails: a user who is not known is ranked by the history that came along, an item that is not
known keeps its place behind those that are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import numpy as np
import numpy.typing as npt
import torch

from dpo4rec_ray.rerankers.catalogue import Catalogue, Histories
from dpo4rec_ray.rerankers.fit import load_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer, UserParts
from dpo4rec_ray.serving.version_files import UNKNOWN, PublishedVersion

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
    num_known: int  # candidates that are known
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
        _lay_out_for_few_rows(model)
        self._scorer = ListScorer([model], catalogue)
        self._uses_history = model.uses_history
        self._nobody: UserParts | None = None
        if version.card.knowledge:
            self._nobody = self._scorer.user_parts(np.zeros((1, catalogue.shape.vector_dim), np.float32))

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """All in one forward pass of the reranker."""
        sizes = [len(request.candidates) for request in requests]
        longest = max(sizes, default=0)
        flat = chain.from_iterable(request.candidates for request in requests)
        rows = np.fromiter(map(self.version.item_rows.get, flat, repeat(UNKNOWN)), np.int64, sum(sizes))
        if min(sizes, default=0) == longest:
            ids = rows.reshape(len(requests), longest)
        else:
            ids = np.full((len(requests), longest), UNKNOWN, np.int64)
            ids[np.arange(longest) < np.array(sizes)[:, None]] = rows
        known = ids != UNKNOWN
        num_known = known.sum(axis=1).tolist()
        mask = None
        if sum(num_known) < ids.size:
            mask = torch.from_numpy(known).to(self._scorer.device)
            ids[~known] = 0
        user_row = self.version.user_index.row
        users = np.array([user_row(one.user_id) if one.user_id else UNKNOWN for one in requests])
        parts, sources = self._knowledge(requests, users)
        histories = self._histories(requests, users) if self._uses_history else None
        places = torch.from_numpy(ids).to(self._scorer.device)
        scores = self._scorer.score_aligned(places, mask, parts, histories).cpu().numpy()
        order = np.argsort(
            -scores, axis=1, kind="stable"
        )  # equal ones and unknown ones (-inf) stay as they came
        if mask is not None:
            scores = np.where(known, scores, np.nan)
        return [
            Ranking(
                order[row] if size == longest else order[row][order[row] < size],
                scores[row, :size],
                num_known[row],
                sources[row],
                user != UNKNOWN,
            )
            for row, (size, user) in enumerate(zip(sizes, users.tolist(), strict=True))
        ]

    def _knowledge(
        self, requests: Sequence[RankRequest], users: npt.NDArray[np.int64]
    ) -> tuple[UserParts | None, list[str]]:
        """What the reranker makes of each request's knowledge, and where that comes from."""
        if self._nobody is None:
            return None, ["none"] * len(requests)
        standard, sides, there = self.version.user_parts(users)
        sources = ["stored" if one else "none" for one in there.tolist()]
        if "none" in sources:
            fresh = [row for row, one in enumerate(requests) if one.vector is not None and not there[row]]
            for array, own in ((standard, self._nobody.standard), (sides, self._nobody.sides[0])):
                array[~there] = own.cpu()
            if fresh:
                written = self._scorer.user_parts(np.stack([requests[row].vector for row in fresh]))
                standard[fresh], sides[fresh] = written.standard.cpu(), written.sides[0].cpu()
            for row in fresh:
                sources[row] = "fresh"
        to = self._scorer.device
        return UserParts(torch.from_numpy(standard).to(to), (torch.from_numpy(sides).to(to),)), sources

    def _histories(self, requests: Sequence[RankRequest], users: npt.NDArray[np.int64]) -> Histories:
        found: list[tuple[list[int], list[float]]] = []
        for request, user in zip(requests, users.tolist(), strict=True):
            if request.history is not None:
                known = map(self.version.item_rows.get, request.history, repeat(UNKNOWN))
                rows = np.fromiter(known, np.int64, len(request.history))
                ratings = list(request.ratings) or [NEUTRAL_RATING] * len(rows)
                kept = rows != UNKNOWN
                found.append((rows[kept].tolist(), np.array(ratings, np.float32)[kept].tolist()))
            else:
                found.append(([], []) if user == UNKNOWN else self.version.history(user))
        newest = self.version.card.max_history  # as many as in training
        found = [
            (items[max(0, len(items) - newest) :], own[max(0, len(own) - newest) :]) for items, own in found
        ]
        longest = max((len(items) for items, _ in found), default=0)
        mask = np.arange(longest) < np.array([len(items) for items, _ in found])[:, None]
        items, ratings = np.zeros(mask.shape, np.int64), np.zeros(mask.shape, np.float32)
        items[mask] = [item for own, _ in found for item in own]
        ratings[mask] = [rating for _, own in found for rating in own]
        whole = Histories(torch.from_numpy(items), torch.from_numpy(mask), torch.from_numpy(ratings))
        return whole.to(self._scorer.device)


def _lay_out_for_few_rows(model: torch.nn.Module) -> None:
    """Keep the weights of linear layers transposed: the same values, and a third less time for a list of ten."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()
