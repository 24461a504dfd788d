"""The HTTP application in this process: its answers, and its error messages."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import quote

import httpx2
import numpy as np
import pyarrow as pa
import pytest
from starlette.testclient import TestClient

from dpo4rec_ray.config.serving import ServingSection
from dpo4rec_ray.core.keys import keys_of
from dpo4rec_ray.serving.api import MAX_BATCH, MAX_CANDIDATES, RerankResponse
from dpo4rec_ray.serving.http import build_api
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.service import Service
from dpo4rec_ray.serving.version_files import KeyIndex, VersionFiles
from dpo4rec_ray.store.artifacts import RunDir
from tests.serving_world import MAX_BODY, Api, requests_of

RERANK, BATCH = "/v1/rerank", "/v1/rerank/batch"
LOCKED = [
    ("POST", RERANK),
    ("POST", "/v2/rerank"),
    ("POST", "/rerank"),
    ("POST", BATCH),
    ("GET", "/v1/models"),
    ("GET", "/v1/examples"),
]
WRONG_TOKEN = "this bearer token is not in serving.token_file"
LOCKED += [("GET", "/v1/users/somebody/knowledge")]
OPEN = ["/", "/docs", "/openapi.json", "/healthz", "/readyz", "/metrics"]


@pytest.fixture(scope="module")
def client(api: Api) -> TestClient:
    """Without tokens, on v1."""
    return api()


@pytest.fixture(scope="module")
def locked(api: Api) -> TestClient:
    return api(tokens=("first", "second"))


@pytest.fixture(scope="module")
def bodies(served_run: RunDir) -> list[dict[str, Any]]:
    return [{key: one[key] for key in ("user_id", "candidates")} for one in requests_of(served_run)]


def in_process(service: Service) -> httpx2.AsyncClient:
    """For requests at the same time."""
    transport = httpx2.ASGITransport(build_api(service, frozenset(), MAX_BODY))
    return httpx2.AsyncClient(transport=transport, base_url="http://test")


def ranked(answer: Any) -> list[tuple[str, float | None]]:
    """Items and scores, best first. Also checks the form of the answer."""
    assert answer.status_code == 200, answer.text
    parsed = RerankResponse.model_validate_json(answer.content)
    return [(one.item_id, one.relevance_score) for one in parsed.results]


def mistakes(answer: Any) -> list[str]:
    """The names of the wrong fields."""
    assert answer.status_code == 422, answer.text
    return [".".join(map(str, one["loc"])) for one in answer.json()["detail"]]


# Tokens


def test_without_tokens_nobody_is_asked(client: TestClient, bodies: list[dict[str, Any]]) -> None:
    assert client.post(RERANK, json=bodies[0]).status_code == 200
    assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize(("method", "path"), LOCKED)
def test_a_token_is_needed(locked: TestClient, bodies: list[dict[str, Any]], method: str, path: str) -> None:
    body = json.dumps({"requests": bodies[:1]} if path == BATCH else bodies[0])
    wrong = [
        "",
        "first",
        "Basic first",
        "Bearer",
        "Bearer third",
        "Bearer firs",
        "Bearer first second",
        "Bearer é",
    ]
    for value in wrong:
        answer = locked.request(method, path, content=body, headers={"Authorization": value.encode()})
        assert answer.status_code == 401, value
        assert answer.headers["www-authenticate"] == "Bearer" and "token" in answer.json()["detail"]
        sent = value.startswith("Bearer ")
        assert answer.json()["message"] == (WRONG_TOKEN if sent else "a bearer token is needed"), value
    assert locked.request(method, path, content="{").status_code == 401, "before the body is looked at"
    for value in ("Bearer first", "bearer second", "Bearer  first"):
        answer = locked.request(method, path, content=body, headers={"Authorization": value})
        assert answer.status_code == (404 if "somebody" in path else 200), answer.text


@pytest.mark.parametrize("path", OPEN)
def test_what_needs_no_token(locked: TestClient, path: str) -> None:
    assert locked.get(path).status_code == 200


# Bodies


@pytest.mark.parametrize("path", [RERANK, BATCH])
def test_a_body_that_is_too_large(api: Api, bodies: list[dict[str, Any]], path: str) -> None:
    client = api(max_body=2000)
    body = json.dumps({"requests": bodies[:1]} if path == BATCH else bodies[0])
    assert client.post(path, content=body.ljust(2000)).status_code == 200
    answer = client.post(path, content=body.ljust(2001))
    assert answer.status_code == 413 and "2000 bytes" in answer.json()["detail"]
    assert client.post(path, content=iter([body.ljust(1500).encode(), b" " * 501])).status_code == 413


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"3000000")]])
def test_no_more_of_a_body_is_read_than_may_be(
    published: Registry, headers: list[tuple[bytes, bytes]]
) -> None:
    """The body has no end, or a header says that it is long."""
    application = build_api(Service(published), frozenset(), 2000)
    scope = {
        "type": "http",
        "method": "POST",
        "path": RERANK,
        "raw_path": RERANK.encode(),
        "query_string": b"",
    }
    scope |= {"headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "", "asgi": {}}
    read, sent = [], []

    async def receive() -> dict[str, Any]:
        read.append(500)
        return {"type": "http.request", "body": b" " * 500, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(application(scope, receive, send))
    assert sent[0]["status"] == 413 and sum(read) <= 2500


WRONG: list[tuple[Any, str, str]] = [
    ({"candidates": ["a"]}, "body", "give user_id or history"),
    ({"user_id": "", "candidates": ["a"]}, "body", "give user_id or history"),
    ({"user_id": "u"}, "body.candidates", "required"),
    ({"user_id": "u", "candidates": []}, "body.candidates", "at least 1"),
    ({"user_id": "u", "candidates": ["a"] * (MAX_CANDIDATES + 1)}, "body.candidates", f"at most {MAX_CANDIDATES}"),
    ({"user_id": "u", "candidates": "abc"}, "body.candidates", "valid array"),
    ({"user_id": "u", "candidates": ["a", "b" * 257]}, "body.candidates.1", "at most 256"),
    ({"user_id": "u", "candidates": ["a", ""]}, "body.candidates.1", "at least 1"),
    ({"user_id": "u", "candidates": ["a", {"item_id": "b", "txt": ""}]}, "body.candidates.1", "not permitted"),
    ({"user_id": "u", "candidates": ["a", None]}, "body.candidates.1", "valid"),
    ({"user_id": "u" * 257, "candidates": ["a"]}, "body.user_id", "at most 256"),
    ({"user_id": ["u"], "candidates": ["a"]}, "body.user_id", "valid string"),
    ({"user_id": "u", "candidates": ["a"], "top_n": 0}, "body.top_n", "greater than or equal to 1"),
    ({"user_id": "u", "candidates": ["a"], "top_n": "many"}, "body.top_n", "valid integer"),
    ({"user_id": "u", "candidates": ["a"], "topn": 3}, "body.topn", "not permitted"),
    ({"user_id": "u", "candidates": ["a"], "return_documents": "perhaps"}, "body.return_documents", "boolean"),
    ({"user_id": "u", "candidates": ["a"], "model": "v2"}, "body.model", "not loaded; there are: v1"),
    ({"user_id": "u", "candidates": ["a"], "model": "v" * 65}, "body.model", "at most 64"),
    ({"history": [{}], "candidates": ["a"]}, "body.history.0.item_id", "required"),
    ({"history": [{"item_id": "a", "rating": 1e7}], "candidates": ["a"]}, "body.history.0.rating", "less than"),
    ({"history": [{"item_id": "a", "timestamp": "now"}], "candidates": ["a"]}, "body.history.0.timestamp", "number"),
    ({"history": {}, "candidates": ["a"]}, "body.history", "valid array"),
    ({"user_id": "u", "candidates": ["a"], "documents": ["a"]}, "body.documents", "not permitted"),
    ([], "body", "object"),
    (None, "body", "object"),
    ("text", "body", "object"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "field", "words"), WRONG)
def test_a_mistake_names_its_field(client: TestClient, body: Any, field: str, words: str) -> None:
    answer = client.post(RERANK, content=json.dumps(body))
    found = {
        ".".join(map(str, one["loc"])): one["msg"]
        for one in answer.json()["detail"]
        if answer.status_code == 422
    }
    assert any(place.startswith(field) and words in text for place, text in found.items()), answer.text
    assert not {"input", "ctx", "url"} & set(answer.json()["detail"][0]), "nothing is sent back"
    if isinstance(body, dict) and field != "body.model":
        (place, *_) = mistakes(
            client.post(BATCH, json={"requests": [{"user_id": "u", "candidates": ["a"]}, body]})
        )
        assert place.startswith(f"body.requests.1{field.removeprefix('body')}")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b'{"user_id": "\\ud800", "candidates": ["a"]}', b"[" * 100_000, b"NaN"],
)
def test_what_is_not_json(client: TestClient, content: bytes) -> None:
    assert mistakes(client.post(RERANK, content=content)) == ["body"]


def test_a_batch_has_a_limit(client: TestClient, bodies: list[dict[str, Any]]) -> None:
    assert client.post(BATCH, json={"requests": bodies[:1] * MAX_BATCH}).status_code == 200
    for count in (0, MAX_BATCH + 1):
        assert mistakes(client.post(BATCH, json={"requests": bodies[:1] * count})) == ["body.requests"]


def test_many_mistakes_are_not_all_listed(client: TestClient) -> None:
    answer = client.post(RERANK, json={"user_id": "u", "candidates": [[]] * MAX_CANDIDATES})
    assert 1 < len(mistakes(answer)) <= 20


# Answers


def test_an_answer(client: TestClient, published: Registry, bodies: list[dict[str, Any]]) -> None:
    answer = client.post(RERANK, json=bodies[0])
    assert answer.headers["content-type"] == "application/json"
    parsed = RerankResponse.model_validate_json(answer.content)
    assert parsed.model == "v1" and parsed.meta.knowledge_version == "statistics"
    assert (parsed.meta.knowledge, parsed.meta.fallback) == ("stored", False) and parsed.meta.latency_ms > 0
    assert sorted(one.index for one in parsed.results) == list(range(len(bodies[0]["candidates"])))
    for one in parsed.results:
        assert one.item_id == bodies[0]["candidates"][one.index] and one.known and one.document is None
    scores = [one.relevance_score for one in parsed.results]
    assert scores == sorted(scores, reverse=True)
    again = RerankResponse.model_validate_json(client.post(RERANK, json=bodies[0]).content)
    assert again.id != parsed.id and again.results == parsed.results


def test_the_fields_of_other_rerank_apis(
    client: TestClient, published: Registry, bodies: list[dict[str, Any]]
) -> None:
    body = bodies[0]
    whole = ranked(client.post(RERANK, json=body))
    user, items = body["user_id"], body["candidates"]
    objects = [{"item_id": item, "text": f"text of {item}"} for item in items]
    assert ranked(client.post(RERANK, json={"user_id": user, "documents": items})) == whole
    assert ranked(client.post(RERANK, json={"user_id": user, "candidates": objects})) == whole
    for top in (1, 3, len(items), 999):
        assert ranked(client.post(RERANK, json={**body, "top_n": top})) == whole[:top]
    version = VersionFiles(published.folder("v1"))
    mixed = [objects[0], *items[1:], "unknown"]
    found = client.post(RERANK, json={"user_id": user, "candidates": mixed, "return_documents": True}).json()
    documents = {one["document"]["item_id"]: one["document"] for one in found["results"]}
    assert documents == {
        items[0]: {"item_id": items[0], "text": f"text of {items[0]}"},
        **{item: {"item_id": item, "text": version.title(version.item_rows[item])} for item in items[1:]},
        "unknown": {"item_id": "unknown"},
    }


def test_ids_may_be_numbers(client: TestClient) -> None:
    found = client.post(RERANK, json={"user_id": 7, "candidates": [1, {"item_id": 22}]}).json()
    assert [(one["item_id"], one["known"]) for one in found["results"]] == [("1", False), ("22", False)]


def test_nobody_and_nothing_known(client: TestClient, bodies: list[dict[str, Any]]) -> None:
    """They are ranked too, and the answer says what it is based on."""
    items = bodies[0]["candidates"]
    stranger = client.post(RERANK, json={"user_id": "stranger", "candidates": [*items, "x"]}).json()
    assert stranger["meta"]["fallback"] and stranger["meta"]["knowledge"] == "none"
    assert stranger["results"][-1] == {"index": len(items), "item_id": "x", "known": False}, (
        "absent, not null"
    )
    nothing = client.post(RERANK, json={**bodies[0], "candidates": ["y", "x"]}).json()
    assert nothing["meta"]["fallback"] and [one["item_id"] for one in nothing["results"]] == ["y", "x"]


def test_a_history_is_ordered_by_time_if_it_says_one(
    api: Api, registry: Registry, served_run: RunDir
) -> None:
    registry.promote("mir")
    client = api(registry)
    one = next(one for one in requests_of(served_run) if len(one["history"]) > 2)
    body = {"user_id": one["user_id"], "candidates": one["candidates"]}
    events = [{**event, "timestamp": 1e9 + place} for place, event in enumerate(one["history"])]
    given = ranked(client.post(RERANK, json={**body, "history": one["history"]}))
    assert ranked(client.post(RERANK, json={**body, "history": events[::-1]})) == given
    backwards = [{**event, "timestamp": None} for event in events[::-1]]
    assert ranked(client.post(RERANK, json={**body, "history": backwards})) != given


def test_a_batch_is_its_lists(client: TestClient, bodies: list[dict[str, Any]]) -> None:
    requests = [*bodies[:8], {"history": [], "candidates": ["x"]}, {**bodies[8], "top_n": 2}]
    together = client.post(BATCH, json={"requests": requests})
    assert together.status_code == 200
    for one, request in zip(together.json()["responses"], requests, strict=True):
        alone = ranked(client.post(RERANK, json=request))
        found = [(result["item_id"], result.get("relevance_score")) for result in one["results"]]
        assert [item for item, _ in found] == [item for item, _ in alone]
        np.testing.assert_allclose(
            [score or 0 for _, score in found], [score or 0 for _, score in alone], atol=1e-5
        )


def test_a_loaded_version_may_be_asked_for(
    api: Api, registry: Registry, bodies: list[dict[str, Any]]
) -> None:
    registry.promote("v3")
    client = api(registry)
    answers = {
        model: client.post(RERANK, json={**bodies[0], "model": model}).json() for model in (None, "v3", "v1")
    }
    assert [one["model"] for one in answers.values()] == ["v3", "v3", "v1"]
    assert answers["v3"]["meta"]["knowledge_version"] == "" and answers["v3"]["meta"]["knowledge"] == "none"
    assert answers["v1"]["results"] != answers["v3"]["results"] == answers[None]["results"]
    cards = {card["id"]: card for card in client.get("/v1/models").json()}
    assert {name: (card["serves"], card["percent"], card["loaded"]) for name, card in cards.items()} == {
        "v1": ("none", 0, True), "v2": ("none", 0, False), "v3": ("current", 100, True), "mir": ("none", 0, False)
    }  # fmt: skip


def test_split_and_shadow(api: Api, registry: Registry, bodies: list[dict[str, Any]]) -> None:
    registry.split("v2", 40)
    registry.shadow("v3")
    client = api(registry)
    cards = {card["id"]: (card["serves"], card["percent"]) for card in client.get("/v1/models").json()}
    assert cards["v1"] == ("current", 60) and cards["v2"] == ("split", 40) and cards["v3"] == ("shadow", 0)
    given = set()
    for body in bodies:
        found = client.post(RERANK, json=body).json()
        given.add(found["model"])
        assert (
            client.post(RERANK, json={**body, "model": found["model"]}).json()["results"] == found["results"]
        )
    assert given == {"v1", "v2"}, "a shadow answers nobody"


def test_examples_can_be_asked(client: TestClient) -> None:
    found = client.get("/v1/examples").json()
    assert found and all(candidate["text"] for one in found for candidate in one["candidates"])
    for example in found[:3]:
        assert all(one["known"] for one in client.post(RERANK, json=example).json()["results"])


def test_knowledge(client: TestClient, published: Registry, bodies: list[dict[str, Any]]) -> None:
    version = VersionFiles(published.folder("v1"))
    user = bodies[0]["user_id"]
    found = client.get(f"/v1/users/{user}/knowledge").json()
    row = version.user_index.row(user)
    assert found["text"] == version.text(row) != "" and (found["version"], found["knowledge"]) == (
        "v1",
        "stored",
    )
    assert [(one["title"], one["rating"]) for one in found["history"]] == [
        (version.title(item), rating) for item, rating in zip(*version.history(row), strict=True)
    ]
    assert client.get("/v1/users/stranger/knowledge").status_code == 404


@pytest.mark.parametrize("user", ["a/b", "a b", "ümlaut", "%41", "a?b#c", "日本", "a+b", "..", "\0"])
def test_a_user_with_any_id(registry: Registry, bodies: list[dict[str, Any]], user: str) -> None:
    """The first user of the version gets the id."""
    folder = registry.folder("v1")
    with pa.OSFile(str(folder / "users.arrow")) as source:
        users = pa.ipc.open_file(source).read_all()
    ids = [user, *users["raw_id"].to_pylist()[1:]]
    KeyIndex.write(folder, "user", keys_of(pa.array(ids)))
    with pa.ipc.new_file(str(folder / "users.arrow"), users.schema) as writer:
        writer.write_table(users.set_column(0, "raw_id", pa.array(ids)))

    async def ask() -> None:
        async with in_process(Service(registry)) as client:
            found = (await client.post(RERANK, json={**bodies[0], "user_id": user})).json()
            assert not found["meta"]["fallback"]
            answer = await client.get(f"/v1/users/{quote(user, safe='').replace('.', '%2E')}/knowledge")
            assert answer.status_code == 200 and answer.json()["user_id"] == user

    asyncio.run(ask())


# Load


def test_too_many_lists_at_once(api: Api, bodies: list[dict[str, Any]]) -> None:
    client = api(max_waiting=4, max_batch=2)
    answer = client.post(BATCH, json={"requests": bodies[:5]})
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
    assert client.post(BATCH, json={"requests": bodies[:4]}).status_code == 200


def test_too_many_requests_at_once(published: Registry, bodies: list[dict[str, Any]]) -> None:
    """Some are answered, the others get a Retry-After. Later requests are answered as before."""

    async def ask() -> None:
        async with in_process(Service(published, ServingSection.model_construct(max_waiting=2))) as client:
            answers = await asyncio.gather(*(client.post(RERANK, json=body) for body in bodies[:12]))
            given = {answer.status_code for answer in answers}
            assert given == {200, 503}
            for answer in answers:
                assert answer.status_code == 200 or int(answer.headers["retry-after"]) >= 1
            assert (await client.post(RERANK, json=bodies[0])).status_code == 200

    asyncio.run(ask())


def test_requests_at_once_are_answered_as_alone(published: Registry, bodies: list[dict[str, Any]]) -> None:
    async def ask() -> None:
        async with in_process(Service(published)) as client:
            together = await asyncio.gather(*(client.post(RERANK, json=body) for body in bodies))
            for answer, body in zip(together, bodies, strict=True):
                alone = ranked(await client.post(RERANK, json=body))
                found = ranked(answer)
                assert [item for item, _ in found] == [item for item, _ in alone]
                assert dict(found) == pytest.approx(dict(alone), abs=1e-5)

    asyncio.run(ask())


# State and documentation


def test_ready_says_what_was_refused(registry: Registry, api: Api) -> None:
    file = registry.folder("v2") / "user_standard.npy"
    file.write_bytes(file.read_bytes()[:-40])
    (registry.root / "traffic.json").write_text(
        json.dumps(
            {"current": "v2", "previous": ["v1"], "split": "", "percent": 0, "shadow": "", "number": 2}
        )
    )
    found = api(registry).get("/readyz").json()
    assert found["versions"] == ["v1"] and "user_standard.npy" in found["refused"]


def test_the_documentation_describes_the_routes(client: TestClient) -> None:
    whole = client.get("/openapi.json").json()
    assert {"/v1/rerank", "/v1/rerank/batch", "/v1/models", "/v1/examples"} < set(whole["paths"])
    names = set(whole["components"]["schemas"])
    used = {text.split('"')[0] for text in json.dumps(whole).split("#/components/schemas/")[1:]}
    assert used <= names and {"RerankRequest", "BatchRequest", "RerankResponse"} <= used
    rerank = whole["paths"]["/v1/rerank"]["post"]
    assert set(rerank["responses"]) >= {"200", "401", "413", "422", "503"}


def test_other_methods_and_paths(client: TestClient) -> None:
    assert client.get(RERANK).status_code == 405 and client.post("/v1/models").status_code == 405
    wrong = (
        "/v1/rerank/",
        "/v1",
        "/v1/rerank/batch/x",
        "http://testserver//v1/rerank",
        "/v3/rerank",
        "/v2/rerank/",
        "/v2",
    )
    for path in wrong:
        assert client.post(path, json={}, follow_redirects=False).status_code in (307, 404), path


def test_a_model_of_a_get_that_is_not_loaded_is_a_mistake_in_the_query(client: TestClient) -> None:
    answer = client.get("/v1/users/u1/knowledge", params={"model": "v9"})
    assert answer.status_code == 422 and answer.json()["detail"][0]["loc"] == ["query", "model"]


def test_a_flood_of_mistakes_is_counted_and_not_listed(client: TestClient) -> None:
    body = {"user_id": "u", "candidates": ["i1"], **{f"x{number}": 1 for number in range(20_000)}}
    answer = client.post(RERANK, json=body)
    assert answer.status_code == 422 and "20000 fields are wrong" in answer.text
