"""Prompts about users and items of one catalogue: as text, and as token ids that leave room for the answer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from dpo4rec_ray.config.texts import GenerateSection, LLMSection, PromptSection
from dpo4rec_ray.knowledge.prompts import (
    FACTORS,
    clean_text,
    control_tokens,
    encode_chat,
    fit_history,
    item_prompt,
    user_prompt,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CataloguePrompts:
    """The text of prompts. Holds the whole catalogue, cleaned of control tokens once."""

    def __init__(
        self,
        items: pa.Table,
        special_tokens: Sequence[str],
        prompt: PromptSection,
        *,
        as_json: bool = False,
    ):
        """items: columns "title" and "attributes", one row per item id; special_tokens: see `clean_text`."""
        self.prompt, self._factors, self._as_json = prompt, FACTORS[prompt.factors], as_json
        self._clean = partial(clean_text, special_tokens=tuple(special_tokens))
        self._titles = [self._clean(title) for title in items["title"].to_pylist()]
        rows = items["attributes"].to_pylist() if prompt.item_attributes else None
        self._attributes = rows and [[self._clean(value) for value in row] for row in rows]

    def user(self, profile: str, item_ids: Sequence[int], ratings: Sequence[float], skip: int = 0) -> str:
        """The prompt of one user with this knowledge history, without its `skip` oldest events."""
        item_ids, ratings = item_ids[skip:], ratings[skip:]
        return user_prompt(
            self._clean(profile),
            [self._titles[item] for item in item_ids],
            ratings,
            [self._attributes[item] for item in item_ids] if self._attributes else None,
            self._factors,
            show_ratings=self.prompt.ratings,
            as_json=self._as_json,
        )

    def item(self, title: str, attributes: Sequence[str]) -> str:
        """The prompt of one item."""
        cleaned = [self._clean(value) for value in attributes]
        return item_prompt(self._clean(title), cleaned, self._factors, as_json=self._as_json)


class TokenizedPrompts:
    """The same prompts as token ids. Safe to call from many threads."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        items: pa.Table,
        llm: LLMSection,
        prompt: PromptSection,
        generate: GenerateSection,
    ):
        """items: as in `CataloguePrompts`."""
        self._tokenizer, self._lock = (
            tokenizer,
            threading.Lock(),
        )  # a fast tokenizer serves one thread at a time
        self._max_tokens = max_prompt_tokens(llm, generate)
        self._catalogue = CataloguePrompts(
            items, control_tokens(tokenizer), prompt, as_json=generate.format == "json"
        )

    def user(self, profile: str, item_ids: Sequence[int], ratings: Sequence[float]) -> tuple[list[int], int]:
        """The longest prompt of this user that fits, and how many of the oldest events it leaves out."""

        def encode(skip: int) -> list[int]:
            return self._encode(self._catalogue.user(profile, item_ids, ratings, skip))

        return fit_history(encode, len(item_ids), self._max_tokens)

    def item(self, title: str, attributes: Sequence[str]) -> list[int]:
        """The prompt of one item, of any length."""
        return self._encode(self._catalogue.item(title, attributes))

    def _encode(self, text: str) -> list[int]:
        with self._lock:
            return encode_chat(self._tokenizer, text)


def max_prompt_tokens(llm: LLMSection, generate: GenerateSection) -> int:
    """Tokens that a prompt may have: what the longest text leaves free."""
    return llm.max_model_len - generate.max_new_tokens
