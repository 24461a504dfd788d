"""What a replica does with a request, without Ray and without HTTP: from the parsed body to the answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo4rec_ray.published import UNKNOWN, PublishedVersion
from dpo4rec_ray.serving.api import (
    Candidate,
    Event,
    Meta,
    ModelCard,
    RerankRequest,
    RerankResponse,
    Result,
    UserKnowledge,
)
from dpo4rec_ray.serving.batcher import Batcher
from dpo4rec_ray.serving.live import Live
from dpo4rec_ray.serving.ranker import Ranker, Ranking, RankRequest
from dpo4rec_ray.serving.registry import Registry


@dataclass(frozen=True)
class Asked:
    """A list and the version that is to rank it."""

    ranker: Ranker
    request: RankRequest


class Service:
    """Answers requests on the versions of a registry; lists that come together are ranked together."""

    def __init__(self, registry: Registry, max_batch: int, max_waiting: int):
        """Raises UserError if the registry has no sound version to answer with."""
        self.registry = registry
        self.live = Live(registry)
        self._batcher: Batcher[Asked, Ranking] = Batcher(_rank_together, max_batch, max_waiting)

    async def rerank(self, body: RerankRequest) -> RerankResponse:
        """Raises Overloaded, or UserError if `model` is none that is loaded."""
        began = time.perf_counter()
        name = self.live.answers(body.user_id or "", body.model)
        ranker = self.live.held.rankers[name]
        ids = [one.item_id if isinstance(one, Candidate) else one for one in body.candidates]
        history, ratings = _history(body.history)
        asked = RankRequest(ids, body.user_id or "", history, ratings)
        ranking = await self._batcher(Asked(ranker, asked))
        return self._response(body, ids, ranking, ranker.version, began)

    def knowledge(self, user_id: str) -> UserKnowledge | None:
        """What the version that answers this user has stored of it; None: the user is not known."""
        version = self.live.held.rankers[self.live.answers(user_id, None)].version
        (row,) = version.user_index.rows([user_id]).tolist()
        if row == UNKNOWN:
            return None
        items, ratings = version.history(row)
        names = version.items["raw_id"]
        return UserKnowledge(
            user_id=user_id,
            version=version.card.version,
            text=version.text(row),
            history=[
                Event(item_id=names[item].as_py(), rating=rating)
                for item, rating in zip(items, ratings, strict=True)
            ],
        )

    def models(self) -> list[ModelCard]:
        """All versions of the registry, and what each of them does."""
        traffic = self.live.held.traffic
        found = []
        for card in self.registry.cards():
            serves = next(
                (
                    role
                    for role, name in (
                        ("current", traffic.current),
                        ("split", traffic.split),
                        ("shadow", traffic.shadow),
                    )
                    if name == card.version
                ),
                "none",
            )
            percent = {"current": 100 - traffic.percent, "split": traffic.percent}.get(serves, 0.0)
            found.append(
                ModelCard(
                    id=card.version,
                    model=card.model,
                    created=card.created,
                    serves=serves,
                    percent=percent,
                    figures=card.figures,
                )
            )
        return found

    def _response(
        self,
        body: RerankRequest,
        ids: list[str],
        ranking: Ranking,
        version: PublishedVersion,
        began: float,
    ) -> RerankResponse:
        scores = ranking.scores.tolist()
        known = np.isfinite(ranking.scores)
        results = [
            Result.model_construct(
                index=place,
                item_id=ids[place],
                relevance_score=scores[place] if known[place] else None,
                document=_document(body.candidates[place]) if body.return_documents else None,
            )
            for place in ranking.order[: body.top_n].tolist()
        ]
        return RerankResponse.model_construct(
            id=uuid.uuid4().hex,
            model=version.card.version,
            results=results,
            meta=Meta.model_construct(
                knowledge_version=version.card.knowledge,
                knowledge=ranking.knowledge,
                fallback=not bool(known.any()) or not ranking.known_user,
                latency_ms=round((time.perf_counter() - began) * 1e3, 3),
            ),
        )


def _rank_together(asked: Sequence[Asked]) -> list[Ranking]:
    """One forward pass per version."""
    found: dict[int, Ranking] = {}
    for ranker in {id(one.ranker): one.ranker for one in asked}.values():
        places = [place for place, one in enumerate(asked) if one.ranker is ranker]
        found |= zip(places, ranker.rank([asked[place].request for place in places]), strict=True)
    return [found[place] for place in range(len(asked))]


def _history(events: list[Event] | None) -> tuple[list[str] | None, list[float]]:
    """Ids and ratings, by time where all events have one."""
    if events is None:
        return None, []
    if all(event.timestamp is not None for event in events):
        events = sorted(events, key=lambda event: event.timestamp or 0.0)
    ratings = [event.rating for event in events]
    if any(rating is None for rating in ratings):
        return [event.item_id for event in events], []
    return [event.item_id for event in events], [rating for rating in ratings if rating is not None]


def _document(candidate: str | Candidate) -> Candidate:
    return (
        candidate
        if isinstance(candidate, Candidate)
        else Candidate.model_construct(item_id=candidate, text=None)
    )
