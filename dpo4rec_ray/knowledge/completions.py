"""What every source of texts gives back: samples, or why there are none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Completion:
    """One sample.

    Attributes:
        token_ids: what the engine produced, EOS included; the LLM is trained on them. Empty without an engine.
        token_logps: the engine's log-probability of each; None where they are not kept.
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    token_logps: list[float] | None = None


@dataclass(frozen=True)
class Answer:
    """What was written for one prompt, or about one user or item.

    Attributes:
        reason: why there are no samples (prompt_too_long, engine_error, endpoint_error, ...); empty if there are.
        detail: the reason in words.
        prompt_token_ids: empty where the source reads no tokens.
        num_left_out: how many of the oldest events the prompt leaves out, so that it fits.
        usage: what the source itself counted: "requests" and "retries" of an endpoint, "prompt_tokens" and "tokens"
            (generated) if the samples have no token ids.
    """

    samples: list[Completion]
    reason: str = ""
    detail: str = ""
    prompt_token_ids: list[int] = field(default_factory=list)
    num_left_out: int = 0
    usage: Mapping[str, int] = field(default_factory=Counter)
