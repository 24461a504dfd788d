"""The HTTP application around a Service: FastAPI, without Ray.

The two rerank routes read and write JSON with pydantic's core, because FastAPI's way of reading a body and writing an answer
costs more than ranking ten candidates. /docs has their schemas all the same.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from dpo4rec_ray.serving.api import (
    BatchRequest,
    BatchResponse,
    Example,
    Mistakes,
    Problem,
    RerankRequest,
    RerankResponse,
    UserKnowledge,
    VersionInfo,
)
from dpo4rec_ray.serving.batcher import Overloaded
from dpo4rec_ray.serving.service import Service
from dpo4rec_ray.serving.version_manager import NotLoaded

RERANK = "/v1/rerank"
# A 422 names at most MAX_MISTAKES wrong fields, and none of them if there are more than TOO_MANY_MISTAKES.
MAX_MISTAKES, TOO_MANY_MISTAKES = 20, 10_000
PLAYGROUND = Path(__file__).parent / "playground.html"
Model = TypeVar("Model", bound=BaseModel)


class DirectRerank:
    """The ASGI application: calls the route of POST /v1/rerank itself, and leaves all other requests to FastAPI.

    FastAPI's routing, dependencies and exception handlers cost about as much as ranking a list.
    """

    def __init__(self, api: FastAPI, rerank: Callable[[Request], Awaitable[Response]]):
        self.api, self._rerank = api, rerank

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == RERANK and scope["method"] == "POST":
            response = await self._rerank(Request(scope, receive))
            await response(scope, receive, send)
        else:
            await self.api(scope, receive, send)


def build_api(service: Service, tokens: frozenset[str], max_body: int) -> DirectRerank:
    """The application.

    Args:
        tokens: bearer tokens, one of which a request must have; empty: none is needed.
        max_body: most bytes of a body; larger ones are answered 413.
    """
    accepted = [token.encode() for token in tokens]

    async def authorised(request: Request) -> None:
        if not accepted:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # All are compared, so that the time does not show which token was nearly right.
        right = [hmac.compare_digest(given.strip().encode(), token) for token in accepted]
        if scheme.lower() != "bearer" or not any(right):
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    api = FastAPI(title="dpo4rec_ray reranks", version="1", redoc_url=None)
    locked = [Depends(authorised)]

    @api.exception_handler(NotLoaded)
    async def mistaken(_: Request, error: NotLoaded) -> Response:
        return problem(error, "query")

    async def read(request: Request, model: type[Model]) -> Model:
        """The body. Reads at most `max_body` bytes. Raises HTTPException 413 or ValidationError."""
        content = b""
        async for chunk in request.stream():
            content += chunk
            if len(content) > max_body:
                raise HTTPException(413, f"the body is larger than {max_body} bytes")
        return model.model_validate_json(content)

    def answered(
        route: Callable[[Request], Awaitable[Any]],
    ) -> Callable[[Request], Awaitable[Response]]:
        """The route's answer as JSON, or the response to an error of the user."""

        @functools.wraps(route)
        async def call(request: Request) -> Response:
            try:
                await authorised(request)
                return Response(to_json(await route(request)), media_type="application/json")
            except (Overloaded, ValidationError, NotLoaded, HTTPException) as error:
                return problem(error)

        return call

    def described(body: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
        """What /docs says about a route that reads its body itself."""
        return {
            "response_model": None,
            "responses": {200: {"model": answer}, **PROBLEMS},
            "openapi_extra": {
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": _reference(body)}},
                }
            },
        }

    @api.post(RERANK, **described(RerankRequest, RerankResponse))
    @answered
    async def rerank(request: Request) -> Any:
        """Rank the candidates for a user."""
        return await service.rerank(await read(request, RerankRequest))

    @api.post(f"{RERANK}/batch", **described(BatchRequest, BatchResponse))
    @answered
    async def rerank_batch(request: Request) -> Any:
        """Rank several lists. All are answered, or none."""
        body = await read(request, BatchRequest)
        return {"responses": await asyncio.gather(*(service.rerank(one) for one in body.requests))}

    @api.get("/v1/users/{user_id:path}/knowledge", dependencies=locked, responses={401: DENIED, 404: DENIED})
    async def knowledge(user_id: str, model: str | None = None) -> UserKnowledge:
        """The text about a user and the user's history, from the version that answers the user or from `model`."""
        found = await service.knowledge(user_id, model)
        if found is None:
            raise HTTPException(404, "this user is not known, and no text about it has been written")
        return found

    @api.get("/v1/models", dependencies=locked, responses={401: DENIED})
    async def models() -> list[VersionInfo]:
        """The published versions and what they do."""
        return await asyncio.to_thread(service.models)

    @api.get("/v1/examples", dependencies=locked, responses={401: DENIED})
    async def examples() -> list[Example]:
        """Recorded lists of the current version, for a first try."""
        return await asyncio.to_thread(service.examples)

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @api.get("/readyz")
    async def readyz() -> dict[str, Any]:
        """The loaded versions, and why the newest state of the registry was refused ("": it was not)."""
        return {
            "status": "ready",
            "versions": list(service.manager.loaded.versions),
            "refused": service.manager.refused,
        }

    @api.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def metrics() -> Response:
        """Metrics per version of this node's replicas, for Prometheus."""
        content, kind = await asyncio.to_thread(service.metrics.text)
        return Response(content, media_type=kind)

    @api.get("/", include_in_schema=False)
    async def playground() -> Response:
        return FileResponse(PLAYGROUND, media_type="text/html")

    api.openapi = lambda: _with_bodies(api)  # the documented way to extend it
    return DirectRerank(api, rerank)


DENIED: dict[str, Any] = {"model": Problem}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "No token, or a wrong one"},
    413: {"model": Problem, "description": "The body is too large"},
    422: {"model": Mistakes, "description": "The wrong fields"},
    503: {"model": Problem, "description": "Too many requests wait; Retry-After says how long to"},
}


def problem(error: Exception, place: str = "body") -> Response:
    """The response to an error. place: where the request has its `model`, "body" or "query"."""
    if isinstance(error, Overloaded):
        return JSONResponse({"detail": "too many requests wait; try again"}, 503, {"Retry-After": "1"})
    if isinstance(error, HTTPException):
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)
    if isinstance(error, ValidationError):
        count = error.error_count()
        if count > TOO_MANY_MISTAKES:  # to list them would take longer than to read the body
            return JSONResponse(
                {"detail": [{"loc": [place], "msg": f"{count} fields are wrong", "type": "too_many"}]}, 422
            )
        found = error.errors(include_url=False, include_context=False, include_input=False)[:MAX_MISTAKES]
        return JSONResponse({"detail": [{**one, "loc": [place, *one["loc"]]} for one in found]}, 422)
    return JSONResponse(
        {"detail": [{"loc": [place, "model"], "msg": str(error), "type": "value_error"}]}, 422
    )


def _with_bodies(api: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with the schemas of the bodies that routes read themselves."""
    if api.openapi_schema is None:
        whole = get_openapi(title=api.title, version=api.version, routes=api.routes)
        wanted = [(RerankRequest, "validation"), (BatchRequest, "validation")]
        _, schemas = models_json_schema(wanted, ref_template="#/components/schemas/{model}")
        whole["components"]["schemas"] |= schemas["$defs"]
        api.openapi_schema = whole
    return api.openapi_schema


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
