"""Requests and answers of the HTTP API. Those of other rerank APIs are in rerank_shapes.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from dpo4rec_ray.errors import UserError

MAX_CANDIDATES = 1000
MAX_HISTORY = 10_000
MAX_BATCH = 64

ItemId = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """Ids may be JSON numbers. An unknown field is an error that names the field."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class Event(Body):
    """An item that the user has seen, bought or rated."""

    item_id: ItemId
    rating: Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)] | None = None
    timestamp: Annotated[float, Field(allow_inf_nan=False)] | None = None


class Candidate(Body):
    """An item to rank. With `return_documents` the answer has its `text`, or without one the item's title."""

    item_id: ItemId
    text: str | None = Field(default=None, max_length=100_000)


class RerankRequest(Body):
    """One list to rank, for a user by id, by history, or both. A history replaces the stored one."""

    user_id: Annotated[str, Field(max_length=256)] | None = None
    history: Annotated[list[Event], Field(max_length=MAX_HISTORY)] | None = None
    candidates: list[ItemId | Candidate] = Field(
        validation_alias=AliasChoices("candidates", "documents"), min_length=1, max_length=MAX_CANDIDATES
    )
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = False
    model: str | None = Field(default=None, max_length=64)  # a version; None: the one that answers this user

    @model_validator(mode="after")
    def _has_user(self) -> RerankRequest:
        if not self.user_id and self.history is None:
            raise ValueError("give user_id or history, or in the shape of other rerank APIs: query")
        return self


class BatchRequest(Body):
    """Several lists at once."""

    requests: list[RerankRequest] = Field(min_length=1, max_length=MAX_BATCH)


class Result(BaseModel):
    """A ranked candidate."""

    index: int  # its place in the request, from 0
    item_id: str
    relevance_score: float | None = None  # logit; absent if the item is unknown
    known: bool
    document: Candidate | None = None  # only with return_documents


class Meta(BaseModel):
    """What the answer is based on."""

    knowledge_version: str  # the system whose texts the reranker reads; "" if it reads none
    knowledge: Literal["stored", "fresh", "none"]
    fallback: bool  # the user is unknown, or all candidates are
    latency_ms: float  # inside the replica


class RerankResponse(BaseModel):
    """Candidates, best first. Unknown ones are last, in the order of the request.

    Candidates whose scores differ by less than 1e-5 may change places between two answers; others never do.
    """

    id: str
    model: str  # the version that answered
    results: list[Result]
    meta: Meta


class BatchResponse(BaseModel):
    """Answers in the order of the requests."""

    responses: list[RerankResponse]


class SeenItem(BaseModel):
    """An item of a stored history."""

    item_id: str
    title: str
    rating: float


class UserKnowledge(BaseModel):
    """The text about a user, stored with a version or written since, and the stored history."""

    user_id: str
    version: str
    knowledge: Literal["stored", "fresh", "none"]
    text: str
    history: list[SeenItem]  # oldest first


class VersionInfo(BaseModel):
    """A published version."""

    id: str
    model: str  # backbone, system and seed of the evaluation
    created: str
    serves: Literal["current", "split", "shadow", "none"]
    percent: float  # share of the users that it answers
    loaded: bool  # whether a request may name it as `model`
    figures: dict[str, float]  # metrics on the run's test lists


class Example(BaseModel):
    """A recorded list for a first try."""

    user_id: str
    candidates: list[Candidate]


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str
    message: str  # the same, where Cohere's clients look for it


class Mistake(BaseModel):
    """A wrong field of a request."""

    loc: list[str | int]
    msg: str
    type: str


class Mistakes(BaseModel):
    """The wrong fields of a request."""

    detail: list[Mistake]
    message: str  # in one line


class WrongField(UserError):
    """A field that only shows to be wrong when the request is answered."""

    def __init__(self, message: str, *field: str | int):
        super().__init__(message)
        self.field = field


def in_one_line(detail: str | Sequence[Any]) -> str:
    """A `detail`; of wrong fields: "history.3.rating: what is wrong; ..."."""
    if isinstance(detail, str):
        return detail
    return "; ".join(f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in detail)
