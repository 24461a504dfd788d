"""A published version in memory: lists to rank -> ranked candidates.

The promise: the same list gets the same scores to within SCORE_TOLERANCE whatever is ranked beside it, and two candidates whose
scores differ by more never change places. Closer ones may: sums of another batch's shape are rounded in another order.

Unknown ids are no errors. A user whom the version does not know is ranked by the history in the request. Items that it does
not know come after all others, in the order of the request.
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
from dpo4rec_ray.serving.version_files import UNKNOWN, VersionFiles

NEUTRAL_RATING = 3.0  # of an event without a rating
# Two bounds on what rounding does to a score: from one batch to another on the same machine, which the API promises; and from
# publishing to now, maybe on another machine or device, beyond which a version is refused (version_check.py).
SCORE_TOLERANCE, RECORDED_TOLERANCE = 1e-5, 1e-4


@dataclass(frozen=True)
class RankTask:
    """One list to rank, in raw ids.

    Attributes:
        history: items, oldest first; None: the history that the version has of the user.
        ratings: one per item of `history`; empty: all are neutral.
        vector: [D] knowledge vector of a user whom the version does not know.
    """

    candidates: Sequence[str]
    user_id: str = ""
    history: Sequence[str] | None = None
    ratings: Sequence[float] = ()
    vector: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Ranking:
    """The answer to a task of n candidates.

    Attributes:
        order: [n] places of the candidates, best first; unknown ones are last, in the order of the task.
        scores: [n] logits in the order of the task; NaN for unknown candidates.
        num_known: known candidates.
        knowledge: where the knowledge vector comes from: "stored", "fresh" or "none".
    """

    order: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    num_known: int
    knowledge: str
    known_user: bool


class LoadedVersion:
    """A version's reranker with its users' knowledge. Keeps no state between calls, so threads may share it."""

    def __init__(self, files: VersionFiles, device: str = "cpu"):
        """Raises UserError if the files do not fit each other."""
        self.files = files
        catalogue = Catalogue.from_items(files.items["attributes"].to_pylist(), files.item_vectors)
        model = load_reranker(files.folder / "reranker", catalogue).to(torch.device(device))
        _lay_out_for_few_rows(model)
        self._scorer = ListScorer([model], catalogue)
        self._uses_history = model.uses_history
        self._nobody: UserParts | None = None  # of a user without a text
        if files.card.knowledge:
            self._nobody = self._scorer.user_parts(np.zeros((1, catalogue.shape.vector_dim), np.float32))

    def rank(self, tasks: Sequence[RankTask]) -> list[Ranking]:
        """Rank all lists in one forward pass of the reranker."""
        sizes = [len(task.candidates) for task in tasks]
        longest = max(sizes, default=0)
        flat = chain.from_iterable(task.candidates for task in tasks)
        rows = np.fromiter(map(self.files.item_rows.get, flat, repeat(UNKNOWN)), np.int64, sum(sizes))
        if min(sizes, default=0) == longest:
            ids = rows.reshape(len(tasks), longest)
        else:
            ids = np.full((len(tasks), longest), UNKNOWN, np.int64)
            ids[np.arange(longest) < np.array(sizes)[:, None]] = rows
        known = ids != UNKNOWN
        num_known = known.sum(axis=1).tolist()
        mask = None
        if sum(num_known) < ids.size:
            mask = torch.from_numpy(known).to(self._scorer.device)
            ids[~known] = 0
        user_row = self.files.user_index.row
        users = np.array([user_row(one.user_id) if one.user_id else UNKNOWN for one in tasks])
        parts, sources = self._knowledge(tasks, users)
        histories = self._histories(tasks, users) if self._uses_history else None
        places = torch.from_numpy(ids).to(self._scorer.device)
        scores = self._scorer.score_aligned(places, mask, parts, histories).cpu().numpy()
        # Stable: equal scores, and those of unknown candidates (-inf), keep the order of the task.
        order = np.argsort(-scores, axis=1, kind="stable")
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
        self, tasks: Sequence[RankTask], users: npt.NDArray[np.int64]
    ) -> tuple[UserParts | None, list[str]]:
        """What the reranker makes of each user's knowledge vector, and where the vector comes from (see Ranking)."""
        if self._nobody is None:
            return None, ["none"] * len(tasks)
        standard, sides, there = self.files.user_parts(users)
        sources = ["stored" if one else "none" for one in there.tolist()]
        if "none" in sources:
            fresh = [row for row, one in enumerate(tasks) if one.vector is not None and not there[row]]
            for array, own in ((standard, self._nobody.standard), (sides, self._nobody.sides[0])):
                array[~there] = own.cpu()
            if fresh:
                written = self._scorer.user_parts(np.stack([tasks[row].vector for row in fresh]))
                standard[fresh], sides[fresh] = written.standard.cpu(), written.sides[0].cpu()
            for row in fresh:
                sources[row] = "fresh"
        to = self._scorer.device
        return UserParts(torch.from_numpy(standard).to(to), (torch.from_numpy(sides).to(to),)), sources

    def _histories(self, tasks: Sequence[RankTask], users: npt.NDArray[np.int64]) -> Histories:
        found: list[tuple[list[int], list[float]]] = []
        for task, user in zip(tasks, users.tolist(), strict=True):
            if task.history is not None:
                known = map(self.files.item_rows.get, task.history, repeat(UNKNOWN))
                rows = np.fromiter(known, np.int64, len(task.history))
                ratings = list(task.ratings) or [NEUTRAL_RATING] * len(rows)
                kept = rows != UNKNOWN
                found.append((rows[kept].tolist(), np.array(ratings, np.float32)[kept].tolist()))
            else:
                found.append(([], []) if user == UNKNOWN else self.files.history(user))
        newest = self.files.card.reranker_history  # as in training
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
    """Store the weights of linear layers transposed. The values stay; a list of ten candidates takes a third less time."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()
