"""Random requests: the service answers all of them, and says which fields are wrong."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from dpo4rec_ray.serving.http import build_api
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.service import Service
from dpo4rec_ray.store.artifacts import RunDir
from tests.serving_world import Api, requests_of

NEW = settings.get_current_profile_name() == "fuzz"  # examples that were never drawn before, and more of them
MAX_BODY = 100_000
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def described(published: Registry) -> BaseSchema:
    """The application, by its own OpenAPI description."""
    application = build_api(Service(published), frozenset(), MAX_BODY)
    return schemathesis.openapi.from_asgi("/openapi.json", application)


@pytest.mark.parametrize("mode", GenerationMode)
def test_what_the_description_allows_and_what_it_does_not(
    described: BaseSchema, mode: GenerationMode
) -> None:
    """No answer is a 5xx. Its status and content are among those that the description has."""
    called = []
    for operation in (found.ok() for found in described.get_all_operations()):
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing can be wrong with it

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=1000 if NEW else 40, deadline=None, suppress_health_check=list(HealthCheck))
        def check(case: Case) -> None:
            case.call_and_validate(checks=CHECKS)

        check()
        called.append(operation.label)
    assert {"POST /v1/rerank", "POST /v2/rerank", "POST /rerank", "POST /v1/rerank/batch"} <= set(called)


VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 1e308, -0.0, 1e-320),
    *("", " ", "a", "\0", "é", "日本", "\u202e", "x" * 257, "9" * 5000, "NaN", "../..", "{}", "%00"),
    *([], {}, [[]], [{}], {"": None}, [None], {"item_id": "a"}, {"item_id": 3, "rating": 1e9}),
    *(float("nan"), float("inf"), ["a"] * 1001),
]
NAMES = [
    "user_id",
    "history",
    "candidates",
    "documents",
    "top_n",
    "return_documents",
    "model",
    "item_id",
    "rating",
]
NAMES += ["timestamp", "text", "requests", "", "__class__", "constructor"]
NAMES += ["query", "texts", "top_k", "rank_fields", "id", "raw_scores", "return_text"]


def anything(draw: random.Random, depth: int = 4) -> Any:
    """A random JSON value, with names and values that requests have and with others."""
    kind = draw.random()
    if not depth or kind < 0.4:
        return draw.choice(VALUES)
    if kind < 0.6:
        return [anything(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {draw.choice(NAMES): anything(draw, depth - 1) for _ in range(draw.randrange(6))}


def changed(draw: random.Random, value: Any) -> Any:
    """The value with one part of it replaced, left out, repeated or renamed."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name = draw.choice(list(value))
        rest = {key: one for key, one in value.items() if key != name}
        kind = draw.random()
        if kind < 0.15:
            return rest
        return {**rest, draw.choice(NAMES) if kind < 0.3 else name: changed(draw, value[name])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        copies = draw.choice([0, 1, 1, 1, 2, 900])
        return value[:place] + [changed(draw, value[place])] * copies + value[place + 1 :]
    return draw.choice(VALUES) if draw.random() < 0.7 else anything(draw)


def random_body(draw: random.Random, valid: list[dict[str, Any]]) -> bytes:
    """Bytes, broken JSON, deep nesting, huge numbers, wrong types, or a valid body with some changes."""
    kind = draw.randrange(6)
    if kind == 0:
        return draw.randbytes(draw.randrange(200))
    if kind == 1:
        depth = 10 ** draw.randrange(1, 6)
        opened = draw.choice(["[", '{"candidates":', '{"user_id": "u", "candidates": [', '{"a":[{"history":'])
        return (opened * (depth // len(opened)) + draw.choice(["", "]", "}", "1"])).encode()
    if kind == 2:
        return json.dumps(anything(draw)).encode()
    body: Any = draw.choice(valid)
    for _ in range(draw.randrange(1, 4)):
        body = changed(draw, body)
    content = json.dumps(body, ensure_ascii=draw.random() < 0.5).encode()
    if kind == 3 and content:
        place = draw.randrange(len(content))
        inserted = draw.choice([b"", b"\\ud800", b"\xff", b"\0", b'"', b"1e99999", b"]", draw.randbytes(3)])
        content = content[:place] + inserted + content[place + draw.randrange(3) :]
    return content


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_bodies(api: Api, served_run: RunDir, count: int) -> None:
    """Each is answered, or refused with the names of the wrong fields. Afterwards the service answers as before."""
    draw = random.Random() if NEW else random.Random(count)
    client = api(max_body=MAX_BODY)
    lists = [
        {key: one[key] for key in ("user_id", "history", "candidates")} for one in requests_of(served_run)
    ]
    batches = [{"requests": lists[place : place + 3]} for place in range(len(lists) - 3)]
    queries = [{"query": one["user_id"], "documents": one["candidates"], "top_n": 3} for one in lists]
    texts = [{"query": one["user_id"], "texts": one["candidates"], "raw_scores": True} for one in lists]
    routes = [
        ("/v1/rerank", lists),
        ("/v1/rerank/batch", batches),
        ("/v2/rerank", queries),
        ("/rerank", texts),
    ]
    before = results(client, lists[0])
    seen: Counter[int] = Counter()
    for _ in range(count):
        path, valid = draw.choice(routes)
        body = random_body(draw, valid)
        answer = client.post(path, content=body)
        seen[answer.status_code] += 1
        assert answer.status_code in (200, 413, 422), (path, body, answer.text)
        if answer.status_code == 422:
            assert all(one["loc"][0] == "body" and one["msg"] for one in answer.json()["detail"]), body
        else:
            json.loads(answer.text, parse_constant=pytest.fail)  # NaN is no JSON
    assert min(seen[200], seen[422]) > count / 50, f"the bodies reach too little: {seen}"
    assert results(client, lists[0]) == before


def results(client: TestClient, body: dict[str, Any]) -> Any:
    return client.post("/v1/rerank", json=body).json()["results"]
