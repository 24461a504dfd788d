"""Prompts about users and items of one catalogue: as text, and as token ids that leave room for the answer."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from dpo4rec_ray.config.texts import GenerateSection, LLMSection, PromptSection
from dpo4rec_ray.knowledge.prompts import (
    Prompt,
    clean_attribute,
    clean_text,
    control_tokens,
    encode_prompt,
    fit_history,
    item_prompt,
    likes,
    style_of,
    user_prompt,
)
from dpo4rec_ray.knowledge.statistics import typical_sentence, typical_values
from dpo4rec_ray.knowledge.wording import LIKES, wording_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpo4rec_ray.config import Config

# An example's events: enough to show what an answer is made of, few enough to leave room for the user's own.
EXAMPLE_EVENTS = 4
NOBODY = -1  # the id of a user whom the run does not know


class ExampleUser(NamedTuple):
    """A training user whose history and counted text are shown to others."""

    user_id: int
    profile: str
    item_ids: Sequence[int]
    ratings: Sequence[float]


class CataloguePrompts:
    """The text of prompts. Holds the whole catalogue, cleaned of control tokens once."""

    def __init__(
        self,
        items: pa.Table,
        special_tokens: Sequence[str],
        prompt: PromptSection,
        *,
        as_json: bool = False,
        style: str = "chat",
        like_at: float | None = None,
        examples: Sequence[ExampleUser] = (),
    ):
        """items: columns "title" and "attributes", one row per item id; special_tokens: see `clean_text`.

        like_at: as in `user_prompt`; examples: one more than prompt.examples, for the prompts of those who are examples.

        Raises:
            UserError: the recipe's wording cannot be used (`wording_of`).
        """
        self.prompt, self.wording = prompt, wording_of(prompt, style, as_json=as_json)
        self._like_at = like_at
        self._clean = partial(clean_text, special_tokens=tuple(special_tokens))
        self._titles = [self._clean(title) for title in items["title"].to_pylist()]
        typical = bool(prompt.examples) or "typical" in self.wording.user.names
        rows = items["attributes"].to_pylist() if prompt.item_attributes or typical else None
        self._clean_attribute = partial(clean_attribute, special_tokens=tuple(special_tokens))
        self._attributes = rows and [list(map(self._clean_attribute, row)) for row in rows]
        counts = Counter(value for row in self._attributes or () for value in dict.fromkeys(row))
        self._shares = {value: count / len(items) for value, count in counts.items()} if typical else None
        self._examples = [(one.user_id, self._example(one)) for one in examples]

    @classmethod
    def of_recipe(
        cls, config: Config, items: pa.Table, examples: Sequence[ExampleUser] = ()
    ) -> CataloguePrompts:
        """The chat prompts of a recipe, for an endpoint whose tokenizer is not known; arguments as in `__init__`."""
        as_json = config.generate.format == "json"
        return cls(items, (), config.prompt, as_json=as_json, like_at=config.like_at, examples=examples)

    def user(self, profile: str, item_ids: Sequence[int], ratings: Sequence[float], skip: int = 0) -> str:
        """The question about one user with this knowledge history, without its `skip` oldest events.

        {typical} is counted from the whole history, also where prompt.max_events or `skip` leaves events out.
        """
        liked, _ = self._liked(item_ids, ratings)
        first = max(skip, len(item_ids) - self.prompt.max_events if self.prompt.max_events else 0, 0)
        shown = item_ids[first:]
        return user_prompt(
            self.wording,
            self._clean(profile),
            [self._titles[item] for item in shown],
            ratings[first:],
            [self._attributes[item] for item in shown]
            if self._attributes and self.prompt.item_attributes
            else [()] * len(shown),
            like_at=self._like_at,
            show_ratings=self.prompt.ratings,
            typical=self._typical(liked),
            date=self.prompt.date,
        )

    def asked(self, question: str, user_id: int = NOBODY) -> Prompt:
        """The whole prompt around a user's question. user_id: who is never an example to himself."""
        others = [example for shown, example in self._examples if shown != user_id]
        return Prompt(
            question, self.wording.lead_in, self.wording.system, tuple(others[: self.prompt.examples])
        )

    def item(self, title: str, attributes: Sequence[str]) -> str:
        """The question about one item."""
        return item_prompt(self.wording, self._clean(title), list(map(self._clean_attribute, attributes)))

    def _liked(self, item_ids: Sequence[int], ratings: Sequence[float]) -> tuple[list[int], list[int]]:
        """The liked items in time order, and the best rated first, of equal ones the newest."""
        liked = [i for i, rating in enumerate(ratings) if likes(rating, self._like_at)]
        best = sorted(liked, key=lambda i: (0.0 if self._like_at is None else -ratings[i], -i))
        return [item_ids[i] for i in liked], [item_ids[i] for i in best]

    def _typical(self, liked: Sequence[int]) -> list[str]:
        if self._shares is None or not self._attributes:
            return []
        return typical_values([self._attributes[item] for item in liked], self._shares)

    def _example(self, user: ExampleUser) -> tuple[str, str]:
        liked, best = self._liked(user.item_ids, user.ratings)
        answer = typical_sentence(self._typical(liked), [self._titles[item] for item in best])
        question = self.user(user.profile, user.item_ids, user.ratings, len(user.item_ids) - EXAMPLE_EVENTS)
        return question, f"{self.wording.lead_in or LIKES} {answer}"


class TokenizedPrompts:
    """The same prompts as token ids. Safe to call from many threads."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        items: pa.Table,
        llm: LLMSection,
        prompt: PromptSection,
        generate: GenerateSection,
        *,
        like_at: float | None = None,
        examples: Sequence[ExampleUser] = (),
    ):
        """items, like_at, examples: as in `CataloguePrompts`."""
        self._tokenizer, self._lock = (
            tokenizer,
            threading.Lock(),
        )  # a fast tokenizer serves one thread at a time
        self._max_tokens = max_prompt_tokens(llm, generate)
        self.catalogue = CataloguePrompts(
            items,
            control_tokens(tokenizer),
            prompt,
            as_json=generate.format == "json",
            style=style_of(tokenizer, prompt.style),
            like_at=like_at,
            examples=examples,
        )

    @classmethod
    def of_recipe(
        cls,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        items: pa.Table,
        examples: Sequence[ExampleUser] = (),
    ) -> TokenizedPrompts:
        """The prompts of a recipe for its LLM; arguments as in `__init__`."""
        sections = config.llm, config.prompt, config.generate
        return cls(tokenizer, items, *sections, like_at=config.like_at, examples=examples)

    def user(
        self, profile: str, item_ids: Sequence[int], ratings: Sequence[float], user_id: int = NOBODY
    ) -> tuple[list[int], int]:
        """The longest prompt of this user that fits, and how many of the oldest events it leaves out."""

        def encode(skip: int) -> list[int]:
            question = self.catalogue.user(profile, item_ids, ratings, skip)
            return self.encode(self.catalogue.asked(question, user_id))

        return fit_history(encode, len(item_ids), self._max_tokens)

    def item(self, title: str, attributes: Sequence[str]) -> list[int]:
        """The prompt of one item, of any length."""
        return self.encode(
            Prompt(self.catalogue.item(title, attributes), system=self.catalogue.wording.system)
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, of any length."""
        with self._lock:
            return encode_prompt(self._tokenizer, prompt, self.catalogue.wording.style)


def max_prompt_tokens(llm: LLMSection, generate: GenerateSection) -> int:
    """Tokens that a prompt may have: what the longest text leaves free."""
    return llm.max_model_len - generate.max_new_tokens
