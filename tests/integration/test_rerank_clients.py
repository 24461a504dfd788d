"""Clients of other rerank APIs, as installed, against the HTTP application: Cohere, LiteLLM, LangChain, and TEI by HTTP."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from dpo4rec_ray.serving.client import Client
from dpo4rec_ray.serving.http import build_api
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.service import Service
from dpo4rec_ray.store.artifacts import RunDir
from tests.serving_world import MAX_BODY, listening, requests_of

TOKEN, TOP = "a-key", 3
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it downloads prices when it is imported


@dataclass(frozen=True)
class Asked:
    """A list, and what our own client is answered: places and scores (sigmoids), best first."""

    url: str
    user: str
    items: list[str]
    answer: list[tuple[int, float]]


@pytest.fixture(scope="module")
def asked(published: Registry, served_run: RunDir) -> Iterator[Asked]:
    one = requests_of(served_run)[0]
    with listening(build_api(Service(published), frozenset({TOKEN}), MAX_BODY)) as url:
        found = Client(url, TOKEN).rerank(one["candidates"], one["user_id"], top_n=TOP).results
        answer = [(result.index, 1 / (1 + math.exp(-(result.relevance_score or 0)))) for result in found]
        yield Asked(url, one["user_id"], one["candidates"], answer)


def same(asked: Asked, found: list[tuple[int, float]]) -> None:
    assert [place for place, _ in found] == [place for place, _ in asked.answer]
    assert [score for _, score in found] == pytest.approx([score for _, score in asked.answer], abs=1e-5)


def test_cohere_v2(asked: Asked) -> None:
    cohere = pytest.importorskip("cohere")
    client = cohere.ClientV2(TOKEN, base_url=asked.url)
    found = client.rerank(
        model="rerank-v3.5",
        query=asked.user,
        documents=asked.items,
        top_n=TOP,
        max_tokens_per_doc=10,
        priority=1,
    )
    same(asked, [(one.index, one.relevance_score) for one in found.results])
    assert found.id and found.meta.api_version.version == "2"
    assert len(client.rerank(model="any", query=asked.user, documents=asked.items).results) == len(
        asked.items
    )


def test_cohere_v1(asked: Asked) -> None:
    cohere = pytest.importorskip("cohere")
    found = cohere.Client(TOKEN, base_url=asked.url).rerank(
        query=asked.user,
        documents=[{"text": item} for item in asked.items],
        top_n=TOP,
        rank_fields=["text"],
        return_documents=True,
        max_chunks_per_doc=1,
    )
    same(asked, [(one.index, one.relevance_score) for one in found.results])
    assert [one.document.text for one in found.results] == [asked.items[place] for place, _ in asked.answer]
    assert found.meta.api_version.version == "1"


def test_cohere_is_told_what_is_wrong(asked: Asked) -> None:
    """Its exceptions carry the body of the answer."""
    cohere = pytest.importorskip("cohere")
    with pytest.raises(cohere.UnprocessableEntityError) as wrong:
        cohere.ClientV2(TOKEN, base_url=asked.url).rerank(model="any", query="", documents=asked.items)
    assert wrong.value.body["message"] == "body.query: String should have at least 1 character"
    with pytest.raises(cohere.UnauthorizedError) as denied:
        cohere.ClientV2("wrong", base_url=asked.url).rerank(model="any", query="u", documents=asked.items)
    assert denied.value.body["message"] == "this bearer token is not in serving.token_file"


def test_cohere_shows_what_was_probably_meant_otherwise(asked: Asked) -> None:
    cohere = pytest.importorskip("cohere")
    client = cohere.ClientV2(TOKEN, base_url=asked.url)
    found = client.rerank(model="any", query="what is new?", documents=["a film", "a book"])
    assert found.meta.warnings == [
        "the user 'what is new?' is not known; see serving.query",
        "none of 2 documents is an item id; see serving.documents",
    ]
    assert client.rerank(model="any", query=asked.user, documents=asked.items).meta.warnings is None


@pytest.mark.parametrize("provider", ["cohere", "jina_ai", "hosted_vllm", "huggingface"])
def test_litellm(asked: Asked, provider: str) -> None:
    """As a server of Cohere, Jina, vLLM or TEI."""
    litellm = pytest.importorskip("litellm")
    found = litellm.rerank(
        model=f"{provider}/any",
        query=asked.user,
        documents=asked.items,
        top_n=TOP,
        return_documents=True,
        api_base=asked.url,
        api_key=TOKEN,
    )
    same(asked, [(one["index"], one["relevance_score"]) for one in found.results])
    texts = [one["document"]["text"] for one in found.results]
    assert texts == [asked.items[place] for place, _ in asked.answer]


def test_langchain(asked: Asked) -> None:
    langchain = pytest.importorskip("langchain_cohere")
    documents = pytest.importorskip("langchain_core.documents")
    reranker = langchain.CohereRerank(model="any", cohere_api_key=TOKEN, base_url=asked.url, top_n=TOP)
    given = [documents.Document(item, metadata={"place": place}) for place, item in enumerate(asked.items)]
    found = reranker.compress_documents(given, asked.user)
    same(asked, [(one.metadata["place"], one.metadata["relevance_score"]) for one in found])
    assert [one.page_content for one in found] == [asked.items[place] for place, _ in asked.answer]


def test_tei(asked: Asked) -> None:
    body: dict[str, Any] = {"query": asked.user, "texts": asked.items, "truncate": True}
    answer = requests.post(
        f"{asked.url}/rerank", json=body, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30
    )
    found = answer.json()
    assert len(found) == len(asked.items) and all(set(one) == {"index", "score"} for one in found)
    same(asked, [(one["index"], one["score"]) for one in found[:TOP]])
