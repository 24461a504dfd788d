"""One preference of another trainer's file, as texts and as token ids, and the reasons why a row gives none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]  # role ("system", "user", "assistant") and content
Fields = Mapping[str, Any]  # a row of a file
TokenIds = Sequence[int]

# Columns of an exported row beside the fields of its format.
IDS = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
OWN = ("user_id", "pair_id", "split", "kind", "rejected_user_id", *IDS, "chosen_reward", "rejected_reward")

EMPTY, NOT_TEXT, NOT_UNICODE = "a text is empty", "a field holds no text", "a text holds half a character"
NOT_AN_OBJECT, UNKNOWN_LAYOUT = "not a JSON object", "a layout that is not known"
NO_PROMPT, EQUAL = "no user turn to answer", "chosen and rejected are the same"
ROLE, SEVERAL, RANKS = "an unknown role", "an answer of several turns", "ranks that name no best answer"
REFUSED, CONTROL = "refused by the chat template", "control tokens in a text"
NOT_ONE_TURN = "a prompt that is not one user turn"


class BadRow(Exception):
    """Why a row gives no pair: one of a few fixed texts, so that rows can be counted by reason."""


@dataclass(frozen=True)
class Stored:
    """The columns `OWN` of a row; None where it has none."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    user_id: int | None
    split: str | None
    pair_id: int | None = None
    kind: str | None = None
    rejected_user_id: int | None = None


@dataclass(frozen=True)
class Preference:
    """A prompt with a chosen and one or more rejected answers, as texts."""

    prompt: list[Message]
    chosen: str
    rejected: list[str]
    chosen_reward: float = math.nan
    rejected_reward: list[float] = field(default_factory=list)
    stored: Stored | None = None


@dataclass(frozen=True)
class TokenPair:
    """What DPO trains on. tokenized: the ids were made from the texts; otherwise the row had them."""

    prompt: TokenIds
    chosen: TokenIds
    rejected: list[TokenIds]
    tokenized: bool
