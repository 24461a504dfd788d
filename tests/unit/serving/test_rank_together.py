"""Lists of different versions and sizes in one batch, and shadows."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from dpo4rec_ray.serving.api import Event, RerankRequest
from dpo4rec_ray.serving.ranker import Ranker, Ranking, RankRequest
from dpo4rec_ray.serving.registry import Registry, check_version
from dpo4rec_ray.serving.service import Asked, Service, Written, _rank_together


@pytest.fixture
def ranker(published: Registry) -> Ranker:
    return check_version(published.folder("v1"))


def test_lists_of_all_sizes_are_ranked_as_alone(ranker: Ranker) -> None:
    items = list(ranker.version.item_rows)
    sizes = [1, 40, 3, 250, 31, 32, 8, 64, 2]
    asked = [RankRequest(items[:size], ranker.version.user_id(size % 7)) for size in sizes]
    together = _rank_together([Asked(ranker, one) for one in asked])
    for one, ranking in zip(asked, together, strict=True):
        assert isinstance(ranking, Ranking)
        (alone,) = ranker.rank([one])
        np.testing.assert_allclose(ranking.scores, alone.scores, atol=1e-5, rtol=0)


def test_a_version_that_fails_fails_nobody_else(ranker: Ranker, published: Registry) -> None:
    other = check_version(published.folder("v2"))
    items = list(ranker.version.item_rows)[:10]
    broken = Asked(other, RankRequest(items, "nobody", vector=np.ones(7, np.float32)))
    good = Asked(ranker, RankRequest(items, ranker.version.user_id(0)))
    found = _rank_together([good, broken, good])
    assert isinstance(found[1], Exception)
    assert isinstance(found[0], Ranking) and isinstance(found[2], Ranking)


def test_a_shadow_is_not_asked_with_the_other_versions_text(registry: Registry) -> None:
    """Its encoder may be another one; whatever it answers, the user's answer stands."""
    registry.shadow("v2")
    service = Service(registry)
    dim = service.live.ranker("", None).version.vector_dim

    class Fits:
        async def find(self, *_: object) -> Written:
            return Written("t", np.ones(dim, np.float32))

    service._fresh = Fits()
    held = service.live.held
    shadow = held.rankers["v2"]
    asked: list[RankRequest] = []
    spy = type(
        "Spy",
        (),
        {
            "version": shadow.version,
            "rank": lambda _, requests: asked.extend(requests) or shadow.rank(requests),
        },
    )()
    service.live.held = replace(held, rankers={**held.rankers, "v2": spy})
    body = RerankRequest(user_id="nobody", history=[Event(item_id="i1")], candidates=["i1", "i2", "i3"])

    async def main() -> dict[str, object]:
        answer = await service.rerank(body)
        await asyncio.gather(*service._shadows)
        return answer

    answer = asyncio.run(main())
    assert answer["meta"]["knowledge"] == "fresh" and len(asked) == 1 and asked[0].vector is None
