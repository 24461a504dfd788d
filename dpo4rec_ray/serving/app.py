"""The HTTP application: a FastAPI ingress on Ray Serve around `serving.service`."""

from __future__ import annotations

import asyncio
import hmac
import os
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from ray import serve

from dpo4rec_ray.config import ServingSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving.api import (
    BatchRequest,
    BatchResponse,
    ModelCard,
    RerankRequest,
    RerankResponse,
    UserKnowledge,
)
from dpo4rec_ray.serving.batcher import Overloaded
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.service import Service

TOKEN = "DPO4REC_SERVE_TOKEN"  # the environment variable that turns authentication on

api = FastAPI(title="dpo4rec_ray reranks", version="1")


def authorised(request: Request) -> None:
    """Raises HTTPException 401 without the token, where one is asked for."""
    token = os.environ.get(TOKEN, "")
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token and not hmac.compare_digest(given.encode(), token.encode()):
        raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})


@api.exception_handler(Overloaded)
async def _overloaded(_: Request, __: Overloaded) -> Response:
    return JSONResponse({"detail": "too many requests wait; try again"}, 503, {"Retry-After": "1"})


@api.exception_handler(UserError)
async def _mistake(_: Request, error: UserError) -> Response:
    return JSONResponse(
        {"detail": [{"loc": ["body", "model"], "msg": str(error), "type": "value_error"}]}, 422
    )


@api.middleware("http")
async def _bounded(request: Request, call_next: Any) -> Response:
    """Bodies over the limit are refused before they are read."""
    size = request.headers.get("content-length", "0")
    limit = int(os.environ.get("DPO4REC_SERVE_MAX_BODY", 4 * 2**20))
    if not size.isdigit() or int(size) > limit:
        return JSONResponse({"detail": f"the body is larger than {limit} bytes"}, 413)
    return await call_next(request)


@serve.deployment
@serve.ingress(api)
class Rerank:
    """One replica."""

    def __init__(self, registry: str, section: dict[str, Any]):
        import torch

        settings = ServingSection(**section)
        torch.set_num_threads(settings.threads)
        self._service = Service(Registry(registry), settings.max_batch, settings.max_waiting)
        self._poll_s = settings.poll_s
        self._watch = asyncio.get_event_loop().create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            await asyncio.to_thread(self._service.live.refresh)

    @api.post("/v1/rerank", dependencies=[Depends(authorised)])
    async def rerank(self, body: RerankRequest) -> RerankResponse:
        return await self._service.rerank(body)

    @api.post("/v1/rerank/batch", dependencies=[Depends(authorised)])
    async def rerank_batch(self, body: BatchRequest) -> BatchResponse:
        answers = await asyncio.gather(*(self._service.rerank(one) for one in body.requests))
        return BatchResponse(responses=answers)

    @api.get("/v1/users/{user_id}/knowledge", dependencies=[Depends(authorised)])
    async def knowledge(self, user_id: str) -> UserKnowledge:
        found = self._service.knowledge(user_id)
        if found is None:
            raise HTTPException(404, "this user is not known to the version that would answer")
        return found

    @api.get("/v1/models", dependencies=[Depends(authorised)])
    async def models(self) -> list[ModelCard]:
        return self._service.models()

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/readyz")
    async def readyz(self) -> dict[str, Any]:
        live = self._service.live
        return {"status": "ready", "versions": list(live.held.rankers), "refused": live.refused}
