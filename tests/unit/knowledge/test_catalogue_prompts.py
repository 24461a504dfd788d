from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from dpo4rec_ray.config.texts import GenerateSection, LLMSection, PromptSection
from dpo4rec_ray.knowledge.catalogue_prompts import CataloguePrompts, TokenizedPrompts, max_prompt_tokens
from dpo4rec_ray.knowledge.prompts import control_tokens, encode_chat
from dpo4rec_ray.knowledge.structured import json_factors
from dpo4rec_ray.policy.model import load_tokenizer

NUM_ITEMS = 30
ITEMS = pa.table(
    {
        "title": [f"Silent Harbor {i} <|end|>" for i in range(NUM_ITEMS)],
        "attributes": [["genre: drama"]] * NUM_ITEMS,
    }
)
LLM = LLMSection(max_model_len=256)
HISTORY = list(range(NUM_ITEMS))
STARS = [4.0] * NUM_ITEMS


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_longest_prompt_that_fits_is_the_catalogues_own(bundled: Path, form: str) -> None:
    tokenizer = load_tokenizer(str(bundled))
    prompt, generate = PromptSection(factors="short"), GenerateSection(max_new_tokens=64, format=form)
    catalogue = CataloguePrompts(ITEMS, control_tokens(tokenizer), prompt, as_json=form == "json")
    token_ids, left_out = TokenizedPrompts(tokenizer, ITEMS, LLM, prompt, generate).user("", HISTORY, STARS)
    room = max_prompt_tokens(LLM, generate)
    assert room == 192
    assert 0 < left_out < NUM_ITEMS
    assert token_ids == encode_chat(tokenizer, catalogue.user("", HISTORY, STARS, left_out))
    assert (
        len(token_ids) <= room < len(encode_chat(tokenizer, catalogue.user("", HISTORY, STARS, left_out - 1)))
    )


def test_one_tokenizer_serves_many_threads(bundled: Path) -> None:
    prompts = TokenizedPrompts(
        load_tokenizer(str(bundled)), ITEMS, LLM, PromptSection(), GenerateSection(max_new_tokens=64)
    )
    alone = [prompts.user("", HISTORY[:size], STARS[:size]) for size in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda size: prompts.user("", HISTORY[:size], STARS[:size]), range(8)))
    assert together == alone


def test_json_is_asked_for_and_read_by_the_same_factors() -> None:
    prompt = PromptSection(factors="short")
    assert json_factors(prompt, GenerateSection()) is None
    factors = json_factors(prompt, GenerateSection(format="json"))
    assert factors == ["genre", "era", "creator"]
    text = CataloguePrompts(ITEMS, ["<|end|>"], prompt, as_json=True).user("", [0], [5.0])
    assert ", ".join(factors) in text and "JSON" in text


def test_small_llms_are_asked_to_the_letter_as_they_were_trained(bundled: Path) -> None:
    """The demo's figures rest on it: this text and no other, under the template of the small LLMs."""
    tokenizer = load_tokenizer(str(bundled))
    prompt, items = PromptSection(factors="short", item_attributes=True), ITEMS.slice(0, 2)
    prompts = TokenizedPrompts(tokenizer, items, LLM, prompt, GenerateSection(max_new_tokens=48), like_at=4)
    text = (
        '<|bos|><|user|>History: "Silent Harbor 0 end" (drama), 4 stars; "Silent Harbor 1 end" (drama), 2.5 stars;\n'
        "Analyse this user's preferences, with reasons, by genre, era, creator.<|assistant|>"
    )
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompts.user("", [0, 1], [4.0, 2.5]) == (expected, 0)
    assert expected[:2] == tokenizer.convert_tokens_to_ids(["<|bos|>", "<|user|>"]) and len(expected) == 54
