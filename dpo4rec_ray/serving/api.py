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
    """An item to rank; `text` is handed back with `return_documents`."""

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
    document: Candidate | None = None


class Meta(BaseModel):
    """What the answer rests on. fallback: the user has no stored knowledge, or no candidate is known."""

    knowledge_version: str
    knowledge: Literal["stored", "fresh", "none"]
    fallback: bool
    latency_ms: float


class RerankResponse(BaseModel):
    """Candidates, best first; those that are not known last, in the order they came in."""

    id: str
    model: str
    results: list[Result]
    meta: Meta


class BatchResponse(BaseModel):
    """Answers in the order of the requests."""

    responses: list[RerankResponse]


class UserKnowledge(BaseModel):
    """What is stored of a user."""

    user_id: str
    version: str
    text: str
    history: list[Event]


class ModelCard(BaseModel):
    """A published version."""

    id: str
    model: str
    created: str
    serves: Literal["current", "split", "shadow", "none"]
    percent: float
    figures: dict[str, float]
