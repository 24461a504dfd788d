"""Requests and answers of the HTTP API, after the rerank APIs of Cohere, Jina and TEI."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

MAX_CANDIDATES = 1000
MAX_HISTORY = 10_000
MAX_BATCH = 64

ItemId = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """Ids may be JSON numbers; a field that is not known is refused by name."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class Event(Body):
    """Something the user did."""

    item_id: ItemId
    rating: Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)] | None = None
    timestamp: Annotated[float, Field(allow_inf_nan=False)] | None = None


class Candidate(Body):
    """An item to rank; `text` is handed back with `return_documents` (without one, the item's title)."""

    item_id: ItemId
    text: str | None = Field(default=None, max_length=100_000)


class RerankRequest(Body):
    """One list to rank, for a user by id, by history, or both (the history then stands for the stored one)."""

    user_id: Annotated[str, Field(max_length=256)] | None = None
    history: Annotated[list[Event], Field(max_length=MAX_HISTORY)] | None = None
    candidates: list[ItemId | Candidate] = Field(
        validation_alias=AliasChoices("candidates", "documents"), min_length=1, max_length=MAX_CANDIDATES
    )
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = False
    model: str | None = Field(default=None, max_length=64)  # a version; None: whoever answers this user

    @model_validator(mode="after")
    def _somebody(self) -> RerankRequest:
        if not self.user_id and self.history is None:
            raise ValueError("give user_id or history")
        return self


class BatchRequest(Body):
    """Several lists at once."""

    requests: list[RerankRequest] = Field(min_length=1, max_length=MAX_BATCH)


class Result(BaseModel):
    """A candidate's place in the answer."""

    index: int  # its place in the request
    item_id: str
    relevance_score: float | None  # logit; None: the item is not known
    known: bool
    document: Candidate | None = None  # only with return_documents


class Meta(BaseModel):
    """What the answer rests on. fallback: the user is not known, or no candidate is."""

    knowledge_version: str  # the system whose texts the reranker reads; "" if it reads none
    knowledge: Literal["stored", "fresh", "none"]
    fallback: bool
    latency_ms: float  # within the replica


class RerankResponse(BaseModel):
    """Candidates, best first; those that are not known last, in the order they came in."""

    id: str
    model: str  # the version that answered
    results: list[Result]
    meta: Meta


class BatchResponse(BaseModel):
    """Answers in the order of the requests."""

    responses: list[RerankResponse]


class SeenItem(BaseModel):
    """An item of a user's history."""

    item_id: str
    title: str
    rating: float


class UserKnowledge(BaseModel):
    """What is stored of a user, or was written since."""

    user_id: str
    version: str
    knowledge: Literal["stored", "fresh", "none"]
    text: str
    history: list[SeenItem]  # oldest first


class ModelCard(BaseModel):
    """A published version."""

    id: str
    model: str  # backbone, system and seed of the evaluation
    created: str
    serves: Literal["current", "split", "shadow", "none"]
    percent: float  # of the users that it answers
    loaded: bool  # whether `model` of a request may name it
    figures: dict[str, float]  # on the run's test lists


class Example(BaseModel):
    """A recorded list, to try the service with."""

    user_id: str
    candidates: list[Candidate]


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str


class Mistake(BaseModel):
    """A field that is wrong."""

    loc: list[str | int]
    msg: str
    type: str


class Mistakes(BaseModel):
    """The fields that are wrong."""

    detail: list[Mistake]
