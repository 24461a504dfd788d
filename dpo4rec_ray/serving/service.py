"""What a replica does with a request: from the parsed body to the answer. Knows neither Ray nor HTTP."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dpo4rec_ray.config.serving import ServingSection
from dpo4rec_ray.serving.api import (
    Candidate,
    Event,
    RerankRequest,
    SeenItem,
    UserKnowledge,
    VersionInfo,
)
from dpo4rec_ray.serving.batcher import Batcher, Overloaded
from dpo4rec_ray.serving.fresh_texts import FreshTextLookup
from dpo4rec_ray.serving.loaded_version import LoadedVersion, Ranking, RankTask
from dpo4rec_ray.serving.query_texts import QueryTexts
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.request_metrics import ServingMetrics
from dpo4rec_ray.serving.rerank_shapes import (
    DocumentsRequest,
    TextsRequest,
    as_ours,
    as_theirs,
    no_item,
    no_user,
)
from dpo4rec_ray.serving.version_files import UNKNOWN, VersionFiles
from dpo4rec_ray.serving.version_manager import VersionManager

NO_ITEM = ""  # an id that no item has
SHORT = 31  # lists of up to this many candidates are ranked together, whatever their sizes
CANDIDATES_IN_LOOP = 8192  # ranked in the thread of the event loop; more would delay other requests
MAX_SHADOWS = 64  # lists that wait for a shadow; further lists are not shadowed
QueuedTask = tuple[LoadedVersion, RankTask]  # a list, and the version that ranks it


class Service:
    """Answers requests with the versions of a registry. Lists that arrive together are ranked together."""

    def __init__(
        self,
        registry: Registry,
        settings: ServingSection | None = None,
        metrics: ServingMetrics | None = None,
        fresh_texts: FreshTextLookup | None = None,
    ):
        """Raises UserError if the registry has no version that can be loaded and can answer what is asked here."""
        self.registry, self.settings = registry, settings or ServingSection()
        device = "cuda" if self.settings.gpus_per_replica else "cpu"
        self._query_texts = QueryTexts(device)
        self.manager = VersionManager(registry, device, self._prepare)
        self.metrics = metrics or ServingMetrics()
        self.failed_in_a_row = 0  # lists
        self._fresh_texts = fresh_texts
        self._batcher = self._new_batcher(self.settings.max_waiting)
        # A batcher of their own: shadows neither delay answers nor take the place of waiting lists.
        self._shadow_batcher = self._new_batcher(MAX_SHADOWS)
        self._shadows: set[asyncio.Task[None]] = set()
        self._name, self._numbers = uuid.uuid4().hex, itertools.count()  # make the ids of answers

    def _prepare(self, version: VersionFiles) -> None:
        """Before a version answers: load what its first request would wait for. Raises UserError if it cannot read texts."""
        if self.settings.query == "text":
            self._query_texts.encoder(version)
        if self.settings.documents == "titles":
            _ = version.ids_of_titles
        _ = version.recorded  # the copy on this machine may go while the version answers

    def _new_batcher(self, max_waiting: int) -> Batcher[QueuedTask, Ranking]:
        return Batcher(rank_together, self.settings.max_batch, max_waiting, _cost, CANDIDATES_IN_LOOP)

    async def rerank(self, body: RerankRequest) -> dict[str, Any]:
        """A RerankResponse as a dict.

        Raises:
            Overloaded: too many lists wait.
            NotLoaded: the version that `model` names is not loaded.
        """
        return (await self._answer(body))[0]

    async def rerank_query(
        self, body: DocumentsRequest | TextsRequest, path: str
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """The answer to a request of another rerank API's client, in its shape. Raises as `rerank`."""
        query, documents = self.settings.query, self.settings.documents
        ours = as_ours(body, query, self.manager.loaded.versions)
        text = body.query if query == "text" else None
        answer, ranking = await self._answer(ours, documents == "titles", text)
        warnings = []
        if query == "user" and not ranking.known_user and ranking.knowledge == "none":
            warnings.append(no_user(body.query))
        if not ranking.num_known:
            warnings.append(no_item(len(ours.candidates), documents))
        return as_theirs(answer, body, path, warnings)

    async def _answer(
        self, body: RerankRequest, titles: bool = False, text: str | None = None
    ) -> tuple[dict[str, Any], Ranking]:
        """The answer as a dict, and the ranking that it shows. Raises as `rerank`.

        Args:
            titles: candidates that are strings are titles, not ids.
            text: in place of a user: what is to be read as the text about one.
        """
        began = time.perf_counter()
        user_id = body.user_id or ""
        version = self.manager.version_for(user_id, body.model)
        ids = [one if isinstance(one, str) else one.item_id for one in body.candidates]
        if titles:
            known = version.files.ids_of_titles
            ids = [
                known.get(one, NO_ITEM) if isinstance(one, str) else one.item_id for one in body.candidates
            ]
        try:
            if text is None:
                task = await self._task(version.files, ids, user_id, body.history)
            else:
                task = RankTask(ids, vector=await self._query_texts.vector(version.files, text))
            ranking = await self._batcher((version, task))
        except Overloaded:
            self.metrics.overloaded()
            raise
        except Exception:
            self.metrics.failed(version.files.card.version)
            self.failed_in_a_row += 1
            raise
        self.failed_in_a_row = 0
        if body.model is None:
            self._shadow(version, task, ranking, text)
        return self._response(body, ids, ranking, version.files, began), ranking

    async def knowledge(self, user_id: str, model: str | None = None) -> UserKnowledge | None:
        """What the version that answers a user has stored of it, or the fresh text; None: nothing is known.

        Raises:
            NotLoaded: the version that `model` names is not loaded.
        """
        version = self.manager.version_for(user_id, model).files
        found = UserKnowledge(
            user_id=user_id, version=version.card.version, knowledge="none", text="", history=[]
        )
        row = version.user_index.row(user_id)
        if row == UNKNOWN:
            fresh = self._fresh_texts and await self._fresh_texts.find(version, user_id, [])
            return found.model_copy(update={"knowledge": "fresh", "text": fresh.text}) if fresh else None
        found.history = [
            SeenItem(item_id=version.item_id(item), title=version.title(item), rating=rating)
            for item, rating in zip(*version.history(row), strict=True)
        ]
        if text := version.text(row):
            found.knowledge, found.text = "stored", text
        return found

    def models(self) -> list[VersionInfo]:
        """All versions of the registry, and what each of them does."""
        loaded = self.manager.loaded
        routing = loaded.routing
        roles = {routing.shadow: "shadow", routing.split: "split", routing.current: "current"}
        percent = {"current": 100 - routing.percent, "split": routing.percent}
        return [
            VersionInfo(
                id=card.version,
                model=card.model,
                created=card.created,
                serves=(role := roles.get(card.version, "none")),
                percent=percent.get(role, 0.0),
                loaded=card.version in loaded.versions,
                figures=card.metrics,
            )
            for card in self.registry.cards()
        ]

    def examples(self) -> list[dict[str, Any]]:
        """The recorded lists of the current version, as Example."""
        version = self.manager.version_for("", self.manager.loaded.routing.current).files
        return [
            {
                "user_id": one["user_id"],
                "candidates": [
                    {"item_id": item, "text": version.title(version.item_rows[item])}
                    for item in one["candidates"]
                ],
            }
            for one in version.recorded
        ]

    async def _task(
        self, version: VersionFiles, ids: list[str], user_id: str, events: list[Event] | None
    ) -> RankTask:
        events = events if events is None else _by_time(events)
        vector = None
        wanted = self._fresh_texts is not None and user_id and version.card.knowledge
        if wanted and version.user_index.row(user_id) == UNKNOWN:
            fresh = await self._fresh_texts.find(version, user_id, events or [])
            vector = None if fresh is None else fresh.vector
        if events is None:
            return RankTask(ids, user_id, vector=vector)
        ratings = [event.rating for event in events if event.rating is not None]
        return RankTask(
            ids,
            user_id,
            [event.item_id for event in events],
            ratings if len(ratings) == len(events) else (),
            vector,
        )

    def _shadow(self, version: LoadedVersion, task: RankTask, sent: Ranking, text: str | None) -> None:
        """Let the shadow rank the list too, if there is room. Its encoder may be another: it reads the text of a query by its
        own, and no fresh vector.
        """
        loaded = self.manager.loaded
        shadow = loaded.versions.get(loaded.routing.shadow)
        if shadow is None or shadow is version or len(self._shadows) >= MAX_SHADOWS:
            return

        async def compare() -> None:
            try:
                vector = None
                if text is not None:
                    encoders = [self._query_texts.encoder(one.files) for one in (shadow, version)]
                    same = encoders[0] is encoders[1]
                    vector = task.vector if same else await self._query_texts.spare(shadow.files, text)
                other = await self._shadow_batcher((shadow, replace(task, vector=vector)))
            except Overloaded:
                return
            except Exception:
                self.metrics.failed(shadow.files.card.version)
                return
            self.metrics.shadowed(shadow.files.card.version, sent, other)

        running = asyncio.get_running_loop().create_task(compare())
        self._shadows.add(running)
        running.add_done_callback(self._shadows.discard)

    def _response(
        self,
        body: RerankRequest,
        ids: list[str],
        ranking: Ranking,
        version: VersionFiles,
        began: float,
    ) -> dict[str, Any]:
        scores: list[float] = ranking.scores.tolist()
        results: list[dict[str, Any]] = [
            {"index": place, "item_id": ids[place], "relevance_score": scores[place], "known": True}
            if scores[place] == scores[place]
            else {"index": place, "item_id": ids[place], "known": False}
            for place in ranking.order[: body.top_n].tolist()
        ]
        if body.return_documents:
            for result in results:
                result["document"] = _document(body.candidates[result["index"]], version)
        fallback = not ranking.known_user or not ranking.num_known
        seconds = time.perf_counter() - began
        self.metrics.answered(version.card.version, ranking, fallback, seconds)
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


def rank_together(queued: Sequence[QueuedTask]) -> list[Ranking | Exception]:
    """One forward pass per version and size of lists. Short lists padded to a long one would cost as much as it does.

    Returns:
        Per list its ranking, or the error of its forward pass.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for place, (version, task) in enumerate(queued):
        size = max(len(task.candidates), SHORT).bit_length()
        groups.setdefault((id(version), size), []).append(place)
    found: list[Ranking | Exception] = [RuntimeError()] * len(queued)
    for places in groups.values():
        try:
            ranked = queued[places[0]][0].rank([queued[place][1] for place in places])
        except Exception as error:  # only the lists of this forward pass fail
            ranked = [error] * len(places)
        for place, ranking in zip(places, ranked, strict=True):
            found[place] = ranking
    return found


def _cost(queued: QueuedTask) -> int:
    """The most that ranking a list costs, in candidates."""
    return 2 * max(len(queued[1].candidates), SHORT)


def _by_time(events: list[Event]) -> list[Event]:
    """Oldest first if all events have a time, else in the order of the request."""
    if all(event.timestamp is not None for event in events):
        return sorted(events, key=lambda event: event.timestamp or 0.0)
    return events


def _document(candidate: str | Candidate, version: VersionFiles) -> dict[str, Any]:
    item_id, text = (candidate, None) if isinstance(candidate, str) else (candidate.item_id, candidate.text)
    row = version.item_rows.get(item_id)
    if text is None and row is None:
        return {"item_id": item_id}
    return {"item_id": item_id, "text": version.title(row) if text is None else text}
