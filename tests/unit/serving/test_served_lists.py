"""What is served is what was evaluated: every test list of the run, by way of the service."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.evaluation.systems import HEADLINE
from dpo4rec_ray.serving.api import RerankRequest, RerankResponse
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.service import Service
from dpo4rec_ray.store.artifacts import RunDir
from tests.serving_world import MODELS, offline_scores, requests_of


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_figures_of_the_evaluation(registry: Registry, served_run: RunDir, name: str) -> None:
    """The same scores for every candidate; and the served order is worth what the run's report says.

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
    figures = service.live.ranker("", None).version.card.figures
    for figure in HEADLINE:
        assert measured[figure].mean() == pytest.approx(figures[figure], abs=1e-6)
