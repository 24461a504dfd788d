"""The HTTP application around a Service: FastAPI, without Ray.

The rerank routes read and write JSON with pydantic's core, because FastAPI's way of reading a body and writing an answer
costs more than ranking ten candidates. /docs has their schemas all the same.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_core import to_json
from starlette.exceptions import HTTPException as StarletteHTTPException
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
    WrongField,
    in_one_line,
)
from dpo4rec_ray.serving.batcher import Overloaded
from dpo4rec_ray.serving.rerank_shapes import (
    BARE,
    V1,
    V2,
    DocumentsRequest,
    DocumentsResponse,
    TextResult,
    TextsRequest,
    read_body,
)
from dpo4rec_ray.serving.service import Service

RERANK = frozenset({V1, V2, BARE})
# A 422 names at most MAX_MISTAKES wrong fields, and none of them if there are more than TOO_MANY_MISTAKES.
MAX_MISTAKES, TOO_MANY_MISTAKES = 20, 10_000
PLAYGROUND = Path(__file__).parent / "playground.html"


class DirectRerank:
    """The ASGI application: calls the route that ranks a list itself, and leaves all other requests to FastAPI.

    FastAPI's routing, dependencies and exception handlers cost about as much as ranking a list.
    """

    def __init__(self, api: FastAPI, rerank: Callable[[Request], Awaitable[Response]]):
        self.api, self._rerank = api, rerank

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in RERANK and scope["method"] == "POST":
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
        given = given.strip()
        # All are compared, so that the time does not show which token was nearly right.
        right = [hmac.compare_digest(given.encode(), token) for token in accepted]
        if scheme.lower() != "bearer" or not any(right):
            sent = scheme.lower() == "bearer" and given
            reason = "this bearer token is not in serving.token_file" if sent else "a bearer token is needed"
            raise HTTPException(401, reason, {"WWW-Authenticate": "Bearer"})

    api = FastAPI(title="dpo4rec_ray reranks", version="1", redoc_url=None)
    locked = [Depends(authorised)]

    @api.exception_handler(WrongField)
    @api.exception_handler(StarletteHTTPException)
    async def mistaken(_: Request, error: Exception) -> Response:
        return problem(error, "query")

    async def content_of(request: Request) -> bytes:
        """The body. Reads at most `max_body` bytes. Raises HTTPException 413."""
        content = b""
        async for chunk in request.stream():
            content += chunk
            if len(content) > max_body:
                raise HTTPException(413, f"the body is larger than {max_body} bytes")
        return content

    def answered(
        route: Callable[[Request], Awaitable[Any]],
    ) -> Callable[[Request], Awaitable[Response]]:
        """The route's answer as JSON, or the response to an error of the user."""

        @functools.wraps(route)
        async def call(request: Request) -> Response:
            try:
                await authorised(request)
                return Response(to_json(await route(request)), media_type="application/json")
            except (Overloaded, ValidationError, WrongField, HTTPException) as error:
                return problem(error)

        return call

    def described(body: Sequence[type[BaseModel]], answer: Any) -> dict[str, Any]:
        """What /docs says about a route that reads its body itself."""
        return {
            "response_model": None,
            "responses": {200: {"model": answer}, **PROBLEMS},
            "openapi_extra": {
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": {"anyOf": [_reference(one) for one in body]}}},
                }
            },
        }

    @answered
    async def rerank(request: Request) -> Any:
        """Rank the candidates for a user. Bodies of Cohere's, Jina's, vLLM's and TEI's clients get their shape of answer."""
        body = read_body(await content_of(request))
        if isinstance(body, RerankRequest):
            return await service.rerank(body)
        return await service.rerank_query(body, request.scope["path"])

    for path in RERANK:
        api.post(path, **described(RERANK_BODIES, RerankResponse | DocumentsResponse | list[TextResult]))(
            rerank
        )

    @api.post(f"{V1}/batch", **described([BatchRequest], BatchResponse))
    @answered
    async def rerank_batch(request: Request) -> Any:
        """Rank several lists. All are answered, or none."""
        body = BatchRequest.model_validate_json(await content_of(request))
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


RERANK_BODIES = [RerankRequest, DocumentsRequest, TextsRequest]
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
        return _refusal(503, "too many requests wait; try again", {"Retry-After": "1"})
    if isinstance(error, StarletteHTTPException):
        return _refusal(error.status_code, error.detail, error.headers)
    if isinstance(error, ValidationError):
        count = error.error_count()
        if count > TOO_MANY_MISTAKES:  # to list them would take longer than to read the body
            return _refusal(422, [{"loc": [place], "msg": f"{count} fields are wrong", "type": "too_many"}])
        found = error.errors(include_url=False, include_context=False, include_input=False)[:MAX_MISTAKES]
        return _refusal(422, [{**one, "loc": [place, *one["loc"]]} for one in found])
    field = error.field if isinstance(error, WrongField) else ()
    return _refusal(422, [{"loc": [place, *field], "msg": str(error), "type": "value_error"}])


def _refusal(status: int, detail: Any, headers: Mapping[str, str] | None = None) -> Response:
    """`message` is where Cohere's clients look for the reason."""
    return JSONResponse({"detail": detail, "message": in_one_line(detail)}, status, headers)


def _with_bodies(api: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with the schemas of the bodies that routes read themselves."""
    if api.openapi_schema is None:
        whole = get_openapi(title=api.title, version=api.version, routes=api.routes)
        wanted = [(one, "validation") for one in (*RERANK_BODIES, BatchRequest)]
        _, schemas = models_json_schema(wanted, ref_template="#/components/schemas/{model}")
        whole["components"]["schemas"] |= schemas["$defs"]
        api.openapi_schema = whole
    return api.openapi_schema


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
