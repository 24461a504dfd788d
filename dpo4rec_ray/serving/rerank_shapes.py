"""The rerank APIs of Cohere, Jina, vLLM and TEI: their bodies become a RerankRequest, and its answer gets their shape.

A body with `query` and none of OWN_FIELDS has their shape; any other is a RerankRequest. With `texts` it is TEI's, and
the answer is a list. All others get one answer, which has what each of their clients reads. Fields that mean nothing to a
recommender (max_tokens_per_doc, truncate, priority, ...) are ignored.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from dpo4rec_ray.serving.api import (
    MAX_CANDIDATES,
    MAX_HISTORY,
    Candidate,
    Event,
    ItemId,
    Meta,
    RerankRequest,
    WrongField,
)

OWN_FIELDS = {"user_id", "history", "candidates"}
ID_FIELDS = ("id", "item_id")  # of a document that is an object
HISTORY_FORMS = "a history is item ids between blanks or commas, or a JSON list of ids or of objects with item_id and rating"
V1, V2, BARE = "/v1/rerank", "/v2/rerank", "/rerank"  # BARE: of vLLM and TEI
LOWEST = float(
    np.finfo(np.float32).min
)  # the logit of an unknown item: these clients need a number; its sigmoid is 0
SHOWN = 80  # characters of a query in a warning
_EVENTS = TypeAdapter(list[ItemId | Event], config=ConfigDict(coerce_numbers_to_str=True))


class QueryRequest(BaseModel):
    """What all of these APIs send. `top_k` is another name of `top_n`; without one, or with 0, all results are sent.

    `model` may name a loaded version; any other name means: the version that answers this user.
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)

    query: str = Field(min_length=1)  # the user, the history or a text: serving.query
    model: str | None = None
    top_n: int | None = Field(default=None, validation_alias=AliasChoices("top_n", "top_k"), ge=0)


class DocumentsRequest(QueryRequest):
    """The body of Cohere (v1 and v2), Jina and vLLM.

    A document is a text or an object. A text is an item id, or a title if serving.documents is "titles". An object has the
    item's `id` or `item_id`, else its `text`; with `rank_fields` the first of these fields that it has is its text.
    """

    documents: list[str | dict[str, Any]] = Field(min_length=1, max_length=MAX_CANDIDATES)
    rank_fields: list[str] | None = None
    return_documents: bool | None = None  # None: as vLLM does at /rerank, and as Cohere does not elsewhere


class TextsRequest(QueryRequest):
    """The body of TEI. `texts` are what `documents` are elsewhere."""

    texts: list[str] = Field(min_length=1, max_length=MAX_CANDIDATES)
    raw_scores: bool = False  # logits in place of their sigmoids
    return_text: bool = False


class Document(BaseModel):
    """A document as it was sent."""

    text: str


class DocumentResult(BaseModel):
    """A ranked document."""

    index: int  # its place in the request, from 0
    relevance_score: float  # in [0, 1]: the sigmoid of the logit; 0 if the item is unknown
    document: Document | None = None  # absent unless asked for


class ApiVersion(BaseModel):
    """Of Cohere."""

    version: str


class DocumentsMeta(Meta):
    """Ours, and what Cohere's clients read."""

    api_version: ApiVersion
    warnings: list[str] | None = None  # what was probably meant otherwise; absent if nothing was


class Usage(BaseModel):
    """Always 0: no tokens are read."""

    prompt_tokens: int = 0
    total_tokens: int = 0


class DocumentsResponse(BaseModel):
    """Documents, best first. Unknown ones are last, in the order of the request."""

    id: str
    object: Literal["list"] = "list"
    model: str  # the version that answered
    results: list[DocumentResult]
    usage: Usage
    meta: DocumentsMeta


class TextResult(BaseModel):
    """A ranked text of TEI."""

    index: int
    score: float  # in [0, 1], or with raw_scores the logit; an unknown item has 0, or the lowest float32
    text: str | None = None  # absent unless asked for


def read_body(content: bytes) -> RerankRequest | DocumentsRequest | TextsRequest:
    """The body, in the shape that its fields say. Raises ValidationError."""
    kind: type[BaseModel] = RerankRequest
    if b'"query"' in content:
        with contextlib.suppress(ValueError):  # no JSON: validation says where
            body = from_json(content)
            if isinstance(body, dict) and "query" in body and not OWN_FIELDS & body.keys():
                kind = TextsRequest if "texts" in body else DocumentsRequest
    return kind.model_validate_json(content)


def as_ours(body: DocumentsRequest | TextsRequest, query: str, versions: Collection[str]) -> RerankRequest:
    """The same list in our shape. A candidate that is an object has an id; a string is what serving.documents says.

    Args:
        query: what the query is, as in serving.query; a text is left to the service.
        versions: the loaded ones.

    Raises:
        WrongField: the query is no history, or a document names no item.
    """
    who: dict[str, Any] = {"user_id": None, "history": None}
    if query == "user":
        who["user_id"] = body.query
    elif query == "history":
        who["history"] = _history(body.query)
    if isinstance(body, TextsRequest):
        candidates = body.texts
    else:
        fields = body.rank_fields or ()
        candidates = [_candidate(one, fields, place) for place, one in enumerate(body.documents)]
    # Not validated again: a document may be longer than an id, and is then an unknown item.
    return RerankRequest.model_construct(
        **who,
        candidates=candidates,
        top_n=body.top_n or None,
        model=body.model if body.model in versions else None,
    )


def as_theirs(
    answer: dict[str, Any], body: DocumentsRequest | TextsRequest, path: str, warnings: Sequence[str] = ()
) -> dict[str, Any] | list[dict[str, Any]]:
    """A RerankResponse as a DocumentsResponse, or for TEI, which reads no warnings, as a list of TextResult; as JSON values."""
    found = [(one["index"], one.get("relevance_score", LOWEST)) for one in answer["results"]]
    if isinstance(body, TextsRequest):
        score = float if body.raw_scores else _sigmoid
        return [
            {"index": place, "score": score(logit)}
            | ({"text": body.texts[place]} if body.return_text else {})
            for place, logit in found
        ]
    asked = path == BARE if body.return_documents is None else body.return_documents
    return {
        "id": answer["id"],
        "object": "list",
        "model": answer["model"],
        "results": [
            {"index": place, "relevance_score": _sigmoid(logit)}
            | ({"document": {"text": _text(body.documents[place], body.rank_fields or ())}} if asked else {})
            for place, logit in found
        ],
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
        "meta": {"api_version": {"version": "2" if path == V2 else "1"}, **answer["meta"]}
        | ({"warnings": list(warnings)} if warnings else {}),
    }


def no_user(query: str) -> str:
    """The warning that `query` is no user's id."""
    shown = query if len(query) <= SHOWN else f"{query[:SHOWN]}..."
    return f"the user {shown!r} is not known; see serving.query"


def no_item(count: int, documents: str) -> str:
    """The warning that none of `count` documents is known. documents: as in serving.documents."""
    what = "a title of an item" if documents == "titles" else "an item id"
    return f"none of {count} documents is {what}; see serving.documents"


def _history(query: str) -> list[Event]:
    """Item ids between blanks or commas, or a JSON list of ids or events; oldest first."""
    try:
        ids = _EVENTS.validate_json(query) if query.lstrip().startswith("[") else re.split(r"[\s,]+", query)
    except ValidationError as error:
        raise WrongField(f"{HISTORY_FORMS} ({error.errors()[0]['msg']})", "query") from None
    events = [Event.model_construct(item_id=one) if isinstance(one, str) else one for one in ids if one]
    if len(events) > MAX_HISTORY:
        raise WrongField(
            f"a history may have at most {MAX_HISTORY} items, this one has {len(events)}", "query"
        )
    return events


def _candidate(document: str | dict[str, Any], rank_fields: Sequence[str], place: int) -> str | Candidate:
    if isinstance(document, str):
        return document
    name = _first(document, (*rank_fields, *ID_FIELDS, "text"))
    if name is None:
        raise WrongField(f"has no {', '.join(ID_FIELDS)} or text that names an item", "documents", place)
    return (
        Candidate.model_construct(item_id=str(document[name])) if name in ID_FIELDS else str(document[name])
    )


def _text(document: str | dict[str, Any], rank_fields: Sequence[str]) -> str:
    """What the answer shows of a document: the text, or what names the item."""
    if isinstance(document, str):
        return document
    return str(document[_first(document, ("text", *rank_fields, *ID_FIELDS)) or "text"])


def _first(document: dict[str, Any], names: Sequence[str]) -> str | None:
    """The first of these fields that the document has, as a string or a whole number."""
    values = ((name, document.get(name)) for name in names)
    return next((name for name, value in values if isinstance(value, str) or type(value) is int), None)


def _sigmoid(logit: float) -> float:
    small = math.exp(-abs(logit))  # at most 1, so that no logit overflows
    return (1.0 if logit >= 0 else small) / (1.0 + small)
