"""Texts as JSON, one string per factor: the schema that an engine holds them to, and what they become."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dpo4rec_ray.knowledge.generator import Completion


def factor_schema(factors: Sequence[str]) -> dict[str, Any]:
    """JSON schema of an object with one non-empty string per factor, all required, in this order."""
    return {
        "type": "object",
        "properties": {factor: {"type": "string", "minLength": 1} for factor in factors},
        "required": list(factors),
        "additionalProperties": False,
    }


def as_sentences(text: str, factors: Sequence[str]) -> str | None:
    """'genre: likes comedies. era: ...', which is what is encoded; None where the text is not the JSON asked for."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(found, dict) or list(found) != list(factors):
        return None
    if not all(isinstance(value, str) and value.strip() for value in found.values()):
        return None
    return " ".join(f"{factor}: {' '.join(value.split()).rstrip('.')}." for factor, value in found.items())


def read_samples(samples: Sequence[Completion], factors: Sequence[str]) -> tuple[list[Completion], int]:
    """The samples with sentences in place of JSON, and how many were not valid: those stay as they are."""
    sentences = [as_sentences(sample.text, factors) for sample in samples]
    kept = [
        sample if text is None else replace(sample, text=text)
        for sample, text in zip(samples, sentences, strict=True)
    ]
    return kept, sentences.count(None)
