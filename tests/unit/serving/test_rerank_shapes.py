"""Bodies of other rerank APIs' clients: what they are read as, what they are answered, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from dpo4rec_ray.serving.api import MAX_CANDIDATES, MAX_HISTORY, Candidate, RerankRequest, WrongField
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.rerank_shapes import (
    LOWEST,
    DocumentsRequest,
    DocumentsResponse,
    TextResult,
    TextsRequest,
    as_ours,
    as_theirs,
    read_body,
)
from dpo4rec_ray.serving.version_files import ITEMS, VersionFiles, arrow_writer
from dpo4rec_ray.store.artifacts import RunDir
from tests.serving_world import Api, requests_of

V1, V2, BARE = PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")
COHERE_V2 = {"model": "any", "query": "u1", "documents": ["i1", "i2", "i3"], "top_n": 2}
COHERE_V1 = {
    "model": "any",
    "query": "u1",
    "documents": [{"text": "i1"}, {"text": "i2"}],
    "top_n": 2,
    "return_documents": True,
    "rank_fields": ["text"],
    "max_chunks_per_doc": 1,
}
JINA = {"model": "any", "query": "u1", "documents": ["i1", "i2"], "top_n": 1, "return_documents": False}
TOP_K = {"query": "u1", "documents": ["i1", "i2"], "top_k": 1}
TEI = {
    "query": "u1",
    "texts": ["i1", "i2"],
    "raw_scores": False,
    "return_text": False,
    "truncate": False,
}
VLLM = {
    **{"query": "u1", "documents": ["i1", {"text": "i2"}], "top_n": 0, "truncate_prompt_tokens": 5, "priority": 0},
    **{"user": "somebody", "instruction": "rank", "use_activation": True, "encoding_format": "float"},
}  # fmt: skip
# A body, and what it is read as: the ids in order (an id that an object names by itself in a tuple), and how many are wanted.
READ: list[tuple[dict[str, Any], list[str | tuple[str]], int | None]] = [
    (COHERE_V2, ["i1", "i2", "i3"], 2),
    ({**COHERE_V2, "max_tokens_per_doc": 4096, "priority": 3}, ["i1", "i2", "i3"], 2),
    ({**COHERE_V2, "top_n": 99}, ["i1", "i2", "i3"], 99),
    ({**COHERE_V2, "top_n": None}, ["i1", "i2", "i3"], None),
    ({**COHERE_V2, "documents": ["i1", "i1", "é 日本", ""]}, ["i1", "i1", "é 日本", ""], 2),
    (COHERE_V1, ["i1", "i2"], 2),
    ({**COHERE_V1, "documents": [{"id": "i1", "text": "A"}, {"item_id": 7}]}, ["A", ("7",)], 2),
    ({**COHERE_V1, "rank_fields": None, "documents": [{"id": 3, "text": "A"}, "i2", {"text": 4}]}, [("3",), "i2", "4"], 2),
    ({**COHERE_V1, "rank_fields": ["sku", "title"], "documents": [{"title": "T", "sku": "s"}, {"title": "U"}]}, ["s", "U"], 2),
    ({**COHERE_V1, "rank_fields": ["sku"], "documents": [{"id": "i1"}, {"sku": True, "text": "x"}]}, [("i1",), "x"], 2),
    (JINA, ["i1", "i2"], 1),
    ({**JINA, "return_embeddings": True, "truncation": True}, ["i1", "i2"], 1),
    ({**JINA, "documents": [1, 2, "3"]}, ["1", "2", "3"], 1),
    ({**JINA, "documents": [{"text": "i1", "meta": {"deep": [1]}}, "i2"]}, ["i1", "i2"], 1),
    (TOP_K, ["i1", "i2"], 1),
    ({**TOP_K, "top_k": 0}, ["i1", "i2"], None),
    ({**TOP_K, "documents": ["x" * 1000]}, ["x" * 1000], 1),
    ({**TOP_K, "model": None}, ["i1", "i2"], 1),
    (TEI, ["i1", "i2"], None),
    ({**TEI, "truncation_direction": "Right", "top_n": 1}, ["i1", "i2"], 1),
    ({**TEI, "texts": [1, "i2", "i2"]}, ["1", "i2", "i2"], None),
    ({**TEI, "documents": ["not these"]}, ["i1", "i2"], None),
    (VLLM, ["i1", "i2"], None),
    ({**VLLM, "top_n": 2}, ["i1", "i2"], 2),
    ({**VLLM, "documents": [{"text": "i1"}, {"text": ""}]}, ["i1", ""], None),
    ({**VLLM, "model": "x" * 500}, ["i1", "i2"], None),
]  # fmt: skip


def read(body: Any) -> DocumentsRequest | TextsRequest:
    found = read_body(json.dumps(body).encode())
    assert not isinstance(found, RerankRequest)
    return found


@pytest.mark.parametrize(("body", "candidates", "top_n"), READ)
def test_what_a_body_is_read_as(body: dict[str, Any], candidates: list[Any], top_n: int | None) -> None:
    ours = as_ours(read(body), "user", ["v1", "v2"])
    named = [(one.item_id,) if isinstance(one, Candidate) else one for one in ours.candidates]
    assert (ours.user_id, ours.history, ours.model) == ("u1", None, None)
    assert named == candidates and ours.top_n == top_n and not ours.return_documents


def test_a_loaded_version_may_be_named_and_a_user_may_be_a_number() -> None:
    ours = as_ours(read({**COHERE_V2, "model": "v2", "query": 17}), "user", ["v1", "v2"])
    assert (ours.model, ours.user_id) == ("v2", "17")


OWN: list[dict[str, Any]] = [
    {"user_id": "u", "candidates": ["query"]},
    {"user_id": "query", "documents": ["a"]},
    {"history": [{"item_id": "query"}], "candidates": ["a"]},
    {"user_id": "u", "candidates": [{"item_id": "a", "text": '"query": "texts"'}]},
]


@pytest.mark.parametrize("body", OWN)
def test_our_own_shape_is_told_from_theirs(body: dict[str, Any]) -> None:
    assert isinstance(read_body(json.dumps(body).encode()), RerankRequest)


WRONG: list[tuple[Any, str, str]] = [
    ({"query": "u", "user_id": "u", "candidates": ["a"]}, "query", "not permitted"),
    ({"query": "u", "history": [], "documents": ["a"]}, "query", "not permitted"),
    ({"query": "u", "candidates": ["a"]}, "query", "not permitted"),
    ({"documents": ["a"]}, "", "query"),
    ({"query": "", "documents": ["a"]}, "query", "at least 1"),
    ({"query": None, "documents": ["a"]}, "query", "valid string"),
    ({"query": {"content": []}, "documents": ["a"]}, "query", "valid string"),
    ({"query": "u"}, "documents", "required"),
    ({"query": "u", "documents": []}, "documents", "at least 1"),
    ({"query": "u", "documents": ["a"] * (MAX_CANDIDATES + 1)}, "documents", f"at most {MAX_CANDIDATES}"),
    ({"query": "u", "documents": "a"}, "documents", "valid array"),
    ({"query": "u", "documents": ["a", None]}, "documents.1", "valid"),
    ({"query": "u", "documents": ["a", ["b"]]}, "documents.1", "valid"),
    ({"query": "u", "documents": ["a", {}]}, "documents.1", "names an item"),
    ({"query": "u", "documents": [{"text": None, "id": [1]}]}, "documents.0", "names an item"),
    ({"query": "u", "documents": ["a"], "top_n": -1}, "top_n", "greater than or equal to 0"),
    ({"query": "u", "documents": ["a"], "top_k": "many"}, "top_k", "valid integer"),
    ({"query": "u", "documents": ["a"], "rank_fields": "text"}, "rank_fields", "valid array"),
    ({"query": "u", "documents": ["a"], "return_documents": "perhaps"}, "return_documents", "boolean"),
    ({"query": "u", "texts": []}, "texts", "at least 1"),
    ({"query": "u", "texts": ["a", {"text": "b"}]}, "texts.1", "valid string"),
    ({"query": "u", "texts": None}, "texts", "valid array"),
]


@pytest.fixture(scope="module")
def client(api: Api) -> TestClient:
    """Without tokens, on v1."""
    return api()


@pytest.fixture(scope="module")
def lists(served_run: RunDir) -> list[dict[str, Any]]:
    return requests_of(served_run)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("body", "field", "words"), WRONG)
def test_a_mistake_names_its_field(client: TestClient, path: str, body: Any, field: str, words: str) -> None:
    """Field by field in `detail`, and in one line in `message`."""
    answer = client.post(path, json=body)
    assert answer.status_code == 422, answer.text
    found = {".".join(map(str, one["loc"])): one["msg"] for one in answer.json()["detail"]}
    place = f"body.{field}".rstrip(".")
    assert any(one.startswith(place) and words.lower() in text.lower() for one, text in found.items()), found
    assert place in answer.json()["message"] and "\n" not in answer.json()["message"]


@pytest.mark.parametrize(
    "content", [b'{"query"', b'["query"]', b'"query"', b'{"query": "\xff"}', b'{"\\u0071uery": 1}']
)
def test_what_is_not_a_body(content: bytes) -> None:
    with pytest.raises(ValidationError):
        read_body(content)


# Answers


def own_scores(client: TestClient, body: dict[str, Any]) -> dict[int, float]:
    """Index -> logit, best first, of the same list in our own shape."""
    answer = client.post(V1, json={"user_id": body["user_id"], "candidates": body["candidates"]})
    return {one["index"]: one["relevance_score"] for one in answer.json()["results"]}


@pytest.mark.parametrize("path", PATHS)
def test_the_order_is_ours_and_the_scores_are_its_sigmoids(
    client: TestClient, lists: list[dict[str, Any]], path: str
) -> None:
    for one in lists[:5]:
        logits = own_scores(client, one)
        body = {"model": "any", "query": one["user_id"], "documents": [*one["candidates"], "nobody's"]}
        answer = client.post(path, json=body)
        assert answer.status_code == 200 and "null" not in answer.text
        parsed = DocumentsResponse.model_validate_json(answer.content)
        assert [result.index for result in parsed.results] == [*logits, len(logits)]
        *known, unknown = (result.relevance_score for result in parsed.results)
        assert known == pytest.approx([1 / (1 + math.exp(-logit)) for logit in logits.values()], abs=1e-5)
        assert unknown == 0 < min(known) and parsed.model == "v1" and not parsed.meta.fallback
        assert parsed.meta.api_version.version == ("2" if path == V2 else "1")
        assert parsed.usage.model_dump() == {"prompt_tokens": 0, "total_tokens": 0}


@pytest.mark.parametrize(
    ("path", "asked", "given"),
    [(V1, None, False), (V2, None, False), (BARE, None, True)]
    + [(path, asked, asked) for path in PATHS for asked in (True, False)],
)
def test_documents_are_sent_back_as_each_client_expects(
    client: TestClient, path: str, asked: bool | None, given: bool
) -> None:
    body = {
        "query": "u1",
        "documents": ["i1", {"id": 2, "text": "title"}, {"id": 3}, {"sku": "s"}],
        "rank_fields": ["sku"],
    }
    answer = client.post(path, json=body | ({} if asked is None else {"return_documents": asked}))
    documents = {one["index"]: one.get("document", {}).get("text") for one in answer.json()["results"]}
    assert documents == (dict(enumerate(["i1", "title", "3", "s"])) if given else dict.fromkeys(range(4)))
    assert given == any("document" in one for one in answer.json()["results"])


def test_tei_gets_a_list(client: TestClient, lists: list[dict[str, Any]]) -> None:
    one = lists[0]
    logits = own_scores(client, one)
    body = {"query": one["user_id"], "texts": [*one["candidates"], "nobody's"]}
    plain = client.post(BARE, json=body).json()
    assert [set(result) for result in plain] == [{"index", "score"}] * (len(logits) + 1)
    assert [result["index"] for result in plain] == [*logits, len(logits)] and plain[-1]["score"] == 0
    raw = client.post(BARE, json={**body, "raw_scores": True, "return_text": True}).json()
    parsed = [TextResult.model_validate(result) for result in raw]
    assert [result.score for result in parsed[:-1]] == pytest.approx(list(logits.values()), abs=1e-5)
    assert parsed[-1].score == LOWEST and [result.text for result in parsed] == [
        body["texts"][result.index] for result in parsed
    ]
    assert client.post(BARE, json={**body, "top_n": 2}).json() == plain[:2]


@pytest.mark.parametrize("logit", [-1e4, -750.0, -40.0, -1.0, 0.0, 1.0, 40.0, 750.0, LOWEST, -LOWEST])
def test_scores_are_between_0_and_1(logit: float) -> None:
    result = {"index": 0, "item_id": "a", "relevance_score": logit, "known": True}
    answer = {"id": "x", "model": "v", "results": [result], "meta": {}}
    (found,) = as_theirs(answer, TextsRequest(query="u", texts=["a"]), BARE)
    assert 0 <= found["score"] <= 1 and (found["score"] > 0.5) == (logit > 0)


def test_an_unknown_user_is_ranked_and_the_answer_says_so(client: TestClient) -> None:
    meta = client.post(V2, json={"query": "what is the capital?", "documents": ["i1", "i2"]}).json()["meta"]
    assert meta["fallback"] and meta["knowledge"] == "none"
    nothing = client.post(V2, json={"query": "u1", "documents": ["x", "y"], "top_n": 5}).json()
    assert [(one["index"], one["relevance_score"]) for one in nothing["results"]] == [(0, 0.0), (1, 0.0)]
    assert nothing["meta"]["fallback"]


STRANGER, NO_IDS = (
    "the user 'who?' is not known; see serving.query",
    "none of 2 documents is an item id; see serving.documents",
)


def test_a_warning_says_what_was_probably_meant_otherwise(api: Api, lists: list[dict[str, Any]]) -> None:
    """Absent if there is none. Texts and titles have their own, and TEI's shape has no place for one."""
    user, (known, *_) = lists[0]["user_id"], lists[0]["candidates"]

    def warned(settings: dict[str, str], query: str, *documents: Any) -> list[str] | None:
        answer = api(**settings).post(V2, json={"query": query, "documents": documents})
        assert answer.status_code == 200 and DocumentsResponse.model_validate_json(answer.content)
        return answer.json()["meta"].get("warnings")

    assert warned({}, user, known, "x") is None
    assert warned({}, user, "x", {"text": "y"}) == [NO_IDS]
    assert warned({}, "who?", known, "x") == [STRANGER]
    assert warned({}, "who?", "x", "y") == [STRANGER, NO_IDS]
    assert warned({"query": "text"}, "who?", known, "x") is None
    assert warned({"query": "history"}, known, known, "x") is None
    titles = ["none of 2 documents is a title of an item; see serving.documents"]
    assert warned({"documents": "titles"}, user, known, "x") == titles
    assert warned({"documents": "titles"}, user, {"id": known}, "x") is None
    (long,) = warned({}, "w" * 5000, known) or []
    assert len(long) < 200 and long.endswith("...' is not known; see serving.query")
    assert isinstance(api().post(BARE, json={"query": "who?", "texts": ["x"]}).json(), list)


@pytest.mark.parametrize("path", PATHS)
def test_tokens_and_limits_are_those_of_our_own_shape(api: Api, path: str) -> None:
    client = api(tokens=("key",), max_body=2000)
    body = json.dumps(COHERE_V2)
    refused = client.post(path, content=body)
    assert refused.status_code == 401 and "bearer token" in refused.json()["message"]
    headers = {"Authorization": "Bearer key"}
    assert client.post(path, content=body, headers=headers).status_code == 200
    large = client.post(path, content=body.ljust(2001), headers=headers)
    assert large.status_code == 413 and "2000 bytes" in large.json()["message"]


def test_versions_and_metrics_are_those_of_our_own_shape(
    api: Api, registry: Registry, lists: list[dict[str, Any]]
) -> None:
    registry.split("v2", 40)
    registry.shadow("v3")
    client = api(registry)
    for one in lists:
        own = client.post(V1, json={"user_id": one["user_id"], "candidates": one["candidates"]}).json()
        body = {"query": one["user_id"], "documents": one["candidates"], "model": "rerank-v3.5"}
        theirs = client.post(V2, json=body).json()
        assert theirs["model"] == own["model"]
        assert client.post(V2, json={**body, "model": "v2"}).json()["model"] == "v2"
    counts = [
        line
        for line in client.get("/metrics").text.splitlines()
        if line.startswith("dpo4rec_serve_answers_total{")
    ]
    assert sum(float(line.split()[-1]) for line in counts) >= 3 * len(lists)


# serving.query and serving.documents


HISTORIES: list[tuple[str, list[str]]] = [
    ("i1 i2,i3", ["i1", "i2", "i3"]),
    (" i1,\n i2 ,", ["i1", "i2"]),
    ('["i 1", 2, "日本"]', ["i 1", "2", "日本"]),
    (' [{"item_id": "a", "rating": 4, "timestamp": 1}, "b"]', ["a", "b"]),
    ("[]", []),
    (" ", []),
]


@pytest.mark.parametrize(("query", "ids"), HISTORIES)
def test_a_query_may_be_a_history(query: str, ids: list[str]) -> None:
    ours = as_ours(DocumentsRequest(query=query, documents=["a"]), "history", [])
    assert ours.user_id is None and ours.history is not None
    assert [event.item_id for event in ours.history] == ids
    for event in ours.history:
        assert (event.rating, event.timestamp) == ((4, 1) if event.item_id == "a" else (None, None))


@pytest.mark.parametrize("query", ["[1", "[[1]]", '[{"id": 1}]', "[null]", "a " * (MAX_HISTORY + 1)])
def test_what_is_no_history(query: str) -> None:
    with pytest.raises(WrongField, match=r"history") as error:
        as_ours(DocumentsRequest(query=query, documents=["a"]), "history", [])
    assert error.value.field == ("query",) and "\n" not in str(error.value)


def test_a_history_ranks_as_in_our_own_shape(
    api: Api, registry: Registry, lists: list[dict[str, Any]]
) -> None:
    registry.promote("mir")
    client = api(registry, query="history")
    one = next(one for one in lists if len(one["history"]) > 2)
    own = client.post(V1, json={"history": one["history"], "candidates": one["candidates"]}).json()
    body = {"query": json.dumps(one["history"]), "documents": one["candidates"]}
    theirs = client.post(V2, json=body).json()
    order = [result["index"] for result in own["results"]]
    assert [result["index"] for result in theirs["results"]] == order
    ids = ", ".join(event["item_id"] for event in one["history"])
    unrated = client.post(V2, json={**body, "query": ids}).json()
    assert unrated["results"] != theirs["results"], "without ratings all count as neutral"
    broken = client.post(V2, json={**body, "query": "[1"})
    assert broken.status_code == 422 and broken.json()["detail"][0]["loc"] == ["body", "query"]


def test_documents_may_be_titles(api: Api, registry: Registry, lists: list[dict[str, Any]]) -> None:
    """Each ranks as the item that it means; a title of two items means the first of them. An id by itself is no title."""
    folder, user, candidates = registry.folder("v1"), lists[0]["user_id"], lists[0]["candidates"]
    items = VersionFiles(folder).items
    titles, ids = items["title"].to_pylist(), items["raw_id"].to_pylist()
    first, second = sorted(map(ids.index, candidates[:2]))
    titles[second] = titles[first] = "日本 é"
    with arrow_writer(folder / "new.arrow", ITEMS) as writer:  # not over the file that `items` maps
        writer.write_table(items.set_column(1, "title", pa.array(titles)))
    (folder / "new.arrow").rename(folder / "items.arrow")
    client = api(registry, documents="titles")
    named = [titles[ids.index(item)] for item in candidates]
    meant = [ids[first], ids[first], *candidates[2:]]
    cases: list[tuple[list[Any], list[str]]] = [
        ([*named, "no title", ids[first], ""], [*meant, "unknown", "unknown", "unknown"]),
        ([{"text": title} for title in named], meant),
        ([{"id": item, "text": "any"} for item in candidates], candidates),
        ([named[0], {"item_id": candidates[1]}, {"text": named[2]}], [meant[0], *candidates[1:3]]),
    ]
    for documents, same_as in cases:
        own = client.post(V1, json={"user_id": user, "candidates": same_as}).json()["results"]
        theirs = client.post(V1, json={"query": user, "documents": documents}).json()["results"]
        assert [one["index"] for one in theirs] == [one["index"] for one in own]
        assert [one["relevance_score"] > 0 for one in theirs] == [one["known"] for one in own]


def test_a_query_may_be_a_text(api: Api, published: Registry, lists: list[dict[str, Any]]) -> None:
    """The text that a version stores about a user, sent as the query, ranks as the user does."""
    version, client = VersionFiles(published.folder("v1")), api(query="text")
    for one in lists[:3]:
        text = version.text(version.user_index.row(one["user_id"]))
        logits = own_scores(client, one)
        found = client.post(BARE, json={"query": text, "texts": one["candidates"], "raw_scores": True}).json()
        scores = {result["index"]: result["score"] for result in found}
        assert scores == pytest.approx(logits, abs=1e-4)
    answer = client.post(V2, json={"query": "likes westerns", "documents": lists[0]["candidates"]}).json()
    assert answer["meta"]["knowledge"] == "fresh"
    other = client.post(V2, json={"query": "likes romance", "documents": lists[0]["candidates"]}).json()
    assert other["results"] != answer["results"]
