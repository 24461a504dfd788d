"""The service without HTTP: lists ranked together, shadows, and the scores of the evaluation."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from dpo4rec_ray.config.serving import ServingSection
from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.evaluation.systems import HEADLINE
from dpo4rec_ray.serving.api import Event, RerankRequest, RerankResponse
from dpo4rec_ray.serving.fresh_texts import FreshText
from dpo4rec_ray.serving.loaded_version import LoadedVersion, Ranking, RankTask
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.service import Service, rank_together
from dpo4rec_ray.serving.version_check import load_version
from dpo4rec_ray.store.artifacts import RunDir
from tests.serving_world import MODELS, offline_scores, requests_of


@pytest.fixture
def version(published: Registry) -> LoadedVersion:
    return load_version(published.folder("v1"))


def test_lists_of_all_sizes_are_ranked_as_alone(version: LoadedVersion) -> None:
    items = list(version.files.item_rows)
    sizes = [1, 40, 3, 250, 31, 32, 8, 64, 2]
    asked = [RankTask(items[:size], version.files.user_id(size % 7)) for size in sizes]
    together = rank_together([(version, one) for one in asked])
    for one, ranking in zip(asked, together, strict=True):
        assert isinstance(ranking, Ranking)
        (alone,) = version.rank([one])
        np.testing.assert_allclose(ranking.scores, alone.scores, atol=1e-5, rtol=0)


def test_a_version_that_fails_fails_nobody_else(version: LoadedVersion, published: Registry) -> None:
    other = load_version(published.folder("v2"))
    items = list(version.files.item_rows)[:10]
    broken = (other, RankTask(items, "nobody", vector=np.ones(7, np.float32)))
    good = (version, RankTask(items, version.files.user_id(0)))
    found = rank_together([good, broken, good])
    assert isinstance(found[1], Exception)
    assert isinstance(found[0], Ranking) and isinstance(found[2], Ranking)


def test_a_shadow_is_not_asked_with_the_other_versions_text(registry: Registry) -> None:
    """The shadow may have another encoder. Whatever it answers, the user gets the same answer."""
    registry.shadow("v2")
    service = Service(registry)
    dim = service.manager.version_for("", None).files.vector_dim

    class Fits:
        async def find(self, *_: object) -> FreshText:
            return FreshText("t", np.ones(dim, np.float32))

    service._fresh_texts = Fits()
    loaded = service.manager.loaded
    shadow = loaded.versions["v2"]
    asked: list[RankTask] = []
    spy = type(
        "Spy",
        (),
        {
            "files": shadow.files,
            "rank": lambda _, tasks: asked.extend(tasks) or shadow.rank(tasks),
        },
    )()
    service.manager.loaded = replace(loaded, versions={**loaded.versions, "v2": spy})
    body = RerankRequest(user_id="nobody", history=[Event(item_id="i1")], candidates=["i1", "i2", "i3"])

    async def main() -> dict[str, object]:
        answer = await service.rerank(body)
        await asyncio.gather(*service._shadows)
        return answer

    answer = asyncio.run(main())
    assert answer["meta"]["knowledge"] == "fresh" and len(asked) == 1 and asked[0].vector is None


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_metrics_of_the_evaluation(registry: Registry, served_run: RunDir, name: str) -> None:
    """Every candidate has the same score, and the metrics of the served order are those of the run's report.

    The history of the request is the list's own: for a backbone that reads it, the stored one may be longer.
    """
    registry.promote(name)
    service, lists = Service(registry), requests_of(served_run)
    bodies = [
        RerankRequest.model_validate({key: one[key] for key in ("user_id", "history", "candidates")})
        for one in lists
    ]

    async def ask() -> list[RerankResponse]:
        return [RerankResponse.model_validate(await service.rerank(body)) for body in bodies]

    answers = asyncio.run(ask())
    longest = max(len(one["candidates"]) for one in lists)
    labels, places = np.zeros((len(lists), longest), np.float32), np.full((len(lists), longest), -np.inf)
    for row, (one, answer, expected) in enumerate(
        zip(lists, answers, offline_scores(served_run, MODELS[name]), strict=True)
    ):
        assert answer.model == name and not answer.meta.fallback
        scores = {result.index: result.relevance_score for result in answer.results}
        np.testing.assert_allclose(
            [scores[place] for place in range(len(expected))], expected, atol=1e-5, rtol=0
        )
        labels[row, : len(expected)] = one["labels"]
        for place, result in enumerate(answer.results):
            places[row, result.index] = -place
    measured = list_metrics(places, labels, HEADLINE, np.isfinite(places))
    metrics = service.manager.version_for("", None).files.card.metrics
    for name in HEADLINE:
        assert measured[name].mean() == pytest.approx(metrics[name], abs=1e-6)


def test_a_key_that_is_added_to_the_section_is_there(published: Registry) -> None:
    class Wider(ServingSection):
        added: int = 7

    assert Service(published, Wider()).settings.added == 7
