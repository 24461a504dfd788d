"""What a replica does with a request, without Ray and without HTTP: from the parsed body to the answer."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dpo4rec_ray.serving.api import Candidate, Event, ModelCard, RerankRequest, SeenItem, UserKnowledge
from dpo4rec_ray.serving.batcher import Batcher, Overloaded
from dpo4rec_ray.serving.figures import Figures
from dpo4rec_ray.serving.live import Live
from dpo4rec_ray.serving.ranker import Ranker, Ranking, RankRequest
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.version_files import UNKNOWN, PublishedVersion

SHORT = 31  # candidates up to which lists are ranked together, whatever their size
PLACES_IN_LOOP = 8192  # candidates ranked in the event loop's thread; more would hold other requests up
MAX_SHADOWS = 64  # lists that wait for a shadow's ranking; more are not shadowed


@dataclass(frozen=True)
class Written:
    """A text that was written for a user whom no version knows."""

    text: str
    vector: npt.NDArray[np.float32]  # [D]


class FreshKnowledge(Protocol):
    """Texts for users whom no version knows."""

    async def find(self, version: PublishedVersion, user_id: str, history: Sequence[Event]) -> Written | None:
        """What has been written; if nothing has, it is asked for and not waited for."""


@dataclass(frozen=True)
class Asked:
    """A list and the version that is to rank it."""

    ranker: Ranker
    request: RankRequest


class Service:
    """Answers requests on the versions of a registry; lists that come together are ranked together."""

    def __init__(
        self,
        registry: Registry,
        max_batch: int = 64,
        max_waiting: int = 512,
        figures: Figures | None = None,
        fresh: FreshKnowledge | None = None,
        device: str = "cpu",
    ):
        """Raises UserError if the registry has no sound version to answer with."""
        self.registry = registry
        self.live = Live(registry, device)
        self.figures = figures or Figures()
        self._fresh = fresh
        self._batcher: Batcher[Asked, Ranking] = Batcher(
            _rank_together, max_batch, max_waiting, _places, PLACES_IN_LOOP
        )
        self._name, self._numbers = uuid.uuid4().hex, itertools.count()  # of answers
        # Apart: a shadow delays nobody's answer and takes nobody's place.
        self._shadow_batcher: Batcher[Asked, Ranking] = Batcher(
            _rank_together, max_batch, MAX_SHADOWS, _places, PLACES_IN_LOOP
        )
        self.failed_in_a_row = 0  # lists
        self._shadows: set[asyncio.Task[None]] = set()

    async def rerank(self, body: RerankRequest) -> dict[str, Any]:
        """A RerankResponse as a dict.

        Raises:
            Overloaded: too many lists wait.
            NotLoaded: `model` is not.
        """
        began = time.perf_counter()
        user_id = body.user_id or ""
        ranker = self.live.ranker(user_id, body.model)
        ids = [one if isinstance(one, str) else one.item_id for one in body.candidates]
        asked = await self._request(ranker.version, ids, user_id, body.history)
        try:
            ranking = await self._batcher(Asked(ranker, asked))
        except Overloaded:
            self.figures.overloaded()
            raise
        except Exception:
            self.figures.failed(ranker.version.card.version)
            self.failed_in_a_row += 1
            raise
        self.failed_in_a_row = 0
        if body.model is None:
            self._shadow(ranker, asked, ranking)
        return self._response(body, ids, ranking, ranker.version, began)

    async def knowledge(self, user_id: str, model: str | None = None) -> UserKnowledge | None:
        """What is stored of a user by the version that answers it, or was written since; None: nothing.

        Raises:
            NotLoaded: `model` is not.
        """
        version = self.live.ranker(user_id, model).version
        row = version.user_index.row(user_id)
        if row == UNKNOWN:
            written = self._fresh and await self._fresh.find(version, user_id, [])
            if not written:
                return None
            return UserKnowledge(
                user_id=user_id,
                version=version.card.version,
                knowledge="fresh",
                text=written.text,
                history=[],
            )
        text = version.text(row)
        return UserKnowledge(
            user_id=user_id,
            version=version.card.version,
            knowledge="stored" if text else "none",
            text=text,
            history=[
                SeenItem(item_id=version.item_id(item), title=version.title(item), rating=rating)
                for item, rating in zip(*version.history(row), strict=True)
            ],
        )

    def models(self) -> list[ModelCard]:
        """All versions of the registry, and what each of them does."""
        held = self.live.held
        roles = {held.traffic.shadow: "shadow", held.traffic.split: "split", held.traffic.current: "current"}
        percent = {"current": 100 - held.traffic.percent, "split": held.traffic.percent}
        return [
            ModelCard(
                id=card.version,
                model=card.model,
                created=card.created,
                serves=(role := roles.get(card.version, "none")),
                percent=percent.get(role, 0.0),
                loaded=card.version in held.rankers,
                figures=card.figures,
            )
            for card in self.registry.cards()
        ]

    def examples(self) -> list[dict[str, Any]]:
        """The recorded lists of the current version, as Example."""
        version = self.live.ranker("", self.live.held.traffic.current).version
        recorded = json.loads((version.folder / "recorded.json").read_text(encoding="utf-8"))
        return [
            {
                "user_id": one["user_id"],
                "candidates": [
                    {"item_id": item, "text": version.title(version.item_rows[item])}
                    for item in one["candidates"]
                ],
            }
            for one in recorded
        ]

    async def _request(
        self, version: PublishedVersion, ids: list[str], user_id: str, events: list[Event] | None
    ) -> RankRequest:
        events = events if events is None else _by_time(events)
        vector = None
        wanted = self._fresh is not None and user_id and version.card.knowledge
        if wanted and version.user_index.row(user_id) == UNKNOWN:
            written = await self._fresh.find(version, user_id, events or [])
            vector = None if written is None else written.vector
        if events is None:
            return RankRequest(ids, user_id, vector=vector)
        ratings = [event.rating for event in events if event.rating is not None]
        return RankRequest(
            ids,
            user_id,
            [event.item_id for event in events],
            ratings if len(ratings) == len(events) else (),
            vector,
        )

    def _shadow(self, ranker: Ranker, asked: RankRequest, given: Ranking) -> None:
        """Ask the shadow too, after the answer and only while there is room. A fresh vector is of another encoder."""
        held = self.live.held
        shadow = held.rankers.get(held.traffic.shadow)
        if shadow is None or shadow is ranker or len(self._shadows) >= MAX_SHADOWS:
            return

        async def ask() -> None:
            try:
                other = await self._shadow_batcher(Asked(shadow, replace(asked, vector=None)))
            except Overloaded:
                return
            except Exception:
                self.figures.failed(shadow.version.card.version)
                return
            self.figures.shadowed(shadow.version.card.version, given, other)

        task = asyncio.get_running_loop().create_task(ask())
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    def _response(
        self,
        body: RerankRequest,
        ids: list[str],
        ranking: Ranking,
        version: PublishedVersion,
        began: float,
    ) -> dict[str, Any]:
        scores: list[Any] = ranking.scores.tolist()
        if ranking.num_known < len(ids):
            scores = [None if score != score else score for score in scores]
        results: list[dict[str, Any]] = [
            {
                "index": place,
                "item_id": ids[place],
                "relevance_score": scores[place],
                "known": scores[place] is not None,
            }
            for place in ranking.order[: body.top_n].tolist()
        ]
        if body.return_documents:
            for result in results:
                result["document"] = _document(body.candidates[result["index"]], version)
        fallback = not ranking.known_user or not ranking.num_known
        seconds = time.perf_counter() - began
        self.figures.answered(version.card.version, ranking, fallback, seconds)
        return {
            "id": f"{self._name}-{next(self._numbers)}",
            "model": version.card.version,
            "results": results,
            "meta": {
                "knowledge_version": version.card.knowledge,
                "knowledge": ranking.knowledge,
                "fallback": fallback,
                "latency_ms": round(seconds * 1e3, 3),
            },
        }


def _rank_together(asked: Sequence[Asked]) -> list[Ranking | Exception]:
    """A forward pass for each version and size of lists: padded to a much longer one, short lists would cost as much."""
    groups: dict[tuple[int, int], list[int]] = {}
    for place, one in enumerate(asked):
        size = max(len(one.request.candidates), SHORT).bit_length()
        groups.setdefault((id(one.ranker), size), []).append(place)
    found: list[Ranking | Exception] = [RuntimeError()] * len(asked)
    for places in groups.values():
        try:
            ranked = asked[places[0]].ranker.rank([asked[place].request for place in places])
        except Exception as error:  # of one version or size: the others have their answers
            ranked = [error] * len(places)
        for place, ranking in zip(places, ranked, strict=True):
            found[place] = ranking
    return found


def _places(asked: Asked) -> int:
    """What ranking a list costs, at most, in candidates."""
    return 2 * max(len(asked.request.candidates), SHORT)


def _by_time(events: list[Event]) -> list[Event]:
    """Oldest first where all events have a time, else as they came."""
    if all(event.timestamp is not None for event in events):
        return sorted(events, key=lambda event: event.timestamp or 0.0)
    return events


def _document(candidate: str | Candidate, version: PublishedVersion) -> dict[str, Any]:
    item_id, text = (candidate, None) if isinstance(candidate, str) else (candidate.item_id, candidate.text)
    row = version.item_rows.get(item_id)
    return {"item_id": item_id, "text": text if text is not None or row is None else version.title(row)}
