"""Texts as JSON, one string per factor: the schema that an engine holds them to, and what they become."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dpo4rec_ray.config.texts import GenerateSection, PromptSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.completions import Completion
from dpo4rec_ray.knowledge.wording import factor_list

# Characters per token, less than there are in English: about 4 in sentences, 3 in keys and punctuation.
_CHARS_PER_TOKEN = {"sentence": 3, "key": 2}
_MIN_CHARS, _MAX_CHARS = 16, 400  # of one string
# Neither a quote nor a backslash nor a control character. xgrammar's own rule for bounded strings lets control characters
# through.
_CHAR, _BLACK = r'[^"\\\x00-\x1f\x7f-\x9f]', r'[^ "\\\x00-\x1f\x7f-\x9f]'
# xgrammar cannot compile one repeat of some hundreds of characters. Repeated blocks it follows ten times as fast.
_BLOCK = 20


def json_factors(prompt: PromptSection, generate: GenerateSection) -> list[str] | None:
    """The keys of the JSON object that every sample is; None where samples are free text."""
    return factor_list(prompt) if generate.format == "json" else None


def json_schema(prompt: PromptSection, generate: GenerateSection) -> dict[str, Any] | None:
    """The schema that every sample has to follow; None where samples are free text."""
    factors = json_factors(prompt, generate)
    return factor_schema(factors, generate.max_new_tokens) if factors else None


def factor_schema(factors: Sequence[str], max_new_tokens: int = 256) -> dict[str, Any]:
    """JSON schema of an object with one non-blank string per factor, all required, in this order.

    The length of strings is bounded so that the object ends within max_new_tokens: if a model does not come to an end,
    a sentence is cut and not the JSON. The bound stands in `pattern`, because xgrammar takes no length beside a pattern.

    Raises:
        UserError: max_new_tokens leaves no room for that many factors.
    """
    skeleton = len(json.dumps(dict.fromkeys(factors, ""), separators=(",", ":")))
    tokens = max_new_tokens - skeleton // _CHARS_PER_TOKEN["key"]
    chars = min(tokens * _CHARS_PER_TOKEN["sentence"] // len(factors), _MAX_CHARS)
    if chars < _MIN_CHARS:
        raise UserError(
            f"generate.max_new_tokens {max_new_tokens}: too few for JSON with a string for each of {len(factors)} factors; "
            "raise it, take prompt.factors with fewer, or generate.format = 'text'"
        )
    more = chars - 2
    blocks = (more + 1) // _BLOCK - 1
    rest = (
        f"({_CHAR}{{{_BLOCK}}}){{0,{blocks}}}{_CHAR}{{0,{_BLOCK - 1}}}"
        if more > 100
        else f"{_CHAR}{{0,{more}}}"
    )
    pattern = f"^ ?{_BLACK}{rest}$"
    return {
        "type": "object",
        "properties": {factor: {"type": "string", "pattern": pattern} for factor in factors},
        "required": list(factors),
        "additionalProperties": False,
    }


def as_sentences(text: str, factors: Sequence[str]) -> str | None:
    """'genre: likes comedies. era: ...', the text that is encoded; None if `text` is not the JSON that was asked for."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # not JSON, nested too deep, or with too long numbers
        return None
    if not isinstance(found, dict) or list(found) != list(factors):
        return None
    if not all(isinstance(value, str) for value in found.values()):
        return None
    sentences = {factor: " ".join(value.split()).rstrip(" .") for factor, value in found.items()}
    if not all(sentences.values()):
        return None
    return " ".join(f"{factor}: {sentence}." for factor, sentence in sentences.items())


def read_samples(
    samples: Sequence[Completion], factors: Sequence[str] | None
) -> tuple[list[Completion], int]:
    """The samples with sentences in place of JSON, and how many were not valid: those stay as they are.

    factors: from `json_factors`; with None the samples are free text, and all stay as they are.
    """
    if factors is None:
        return list(samples), 0
    sentences = [as_sentences(sample.text, factors) for sample in samples]
    kept = [
        sample if text is None else replace(sample, text=text)
        for sample, text in zip(samples, sentences, strict=True)
    ]
    return kept, sentences.count(None)
