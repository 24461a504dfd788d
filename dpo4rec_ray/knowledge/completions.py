"""What every source of texts gives back: samples, or why there are none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Completion:
    """One sample. `token_ids` are what the engine produced, EOS included; DPO trains on them. Empty without an engine."""

    token_ids: list[int]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Answer:
    """What an engine gives back for one prompt.

    Attributes:
        reason: why there are no samples (prompt_too_long, engine_error); empty if there are.
        detail: the reason in words.
    """

    samples: list[Completion]
    reason: str = ""
    detail: str = ""
