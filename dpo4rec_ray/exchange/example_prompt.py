"""The prompt that a recipe asks its policy with, about an invented user: what a model card may show of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.knowledge.catalogue_prompts import ExampleUser, TokenizedPrompts
from dpo4rec_ray.knowledge.prompts import prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ITEMS = pa.table(
    {
        "title": ["First invented title", "Second invented title", "Third invented title"],
        "attributes": [["genre: Comedy"], ["genre: Drama"], ["genre: Comedy"]],
    }
)
HISTORY = (0, 1, 2)


def example_prompt(config: Config, tokenizer: PreTrainedTokenizerBase) -> str:
    """The whole prompt with its special tokens, to be tokenised with add_special_tokens=False.

    Where prompts show training users as examples, invented ones stand in their place.
    """
    least = 1.0 if config.like_at is None else config.like_at
    ratings = (least, least - 1, least)
    shown = [ExampleUser(number, "", HISTORY, ratings) for number in range(config.prompt.examples)]
    prompts = TokenizedPrompts.of_recipe(config, tokenizer, ITEMS, shown).catalogue
    question = prompts.user("invented profile", HISTORY, ratings)
    text = prompt_text(tokenizer, prompts.asked(question), prompts.wording.style)
    bos = tokenizer.bos_token
    return text if not bos or bos in text else f"{bos}{text}"
