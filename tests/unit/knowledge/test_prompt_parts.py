"""System prompt, lead-in and examples, as token ids of every family and of base LLMs."""

from __future__ import annotations

import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerBase

from dpo4rec_ray.config.texts import GenerateSection, LLMSection, PromptSection
from dpo4rec_ray.knowledge.catalogue_prompts import CataloguePrompts, ExampleUser, TokenizedPrompts
from dpo4rec_ray.knowledge.prompts import (
    Prompt,
    encode_chat,
    encode_prompt,
    messages,
    style_remarks,
    takes_system,
)
from tests.unit.knowledge.test_prompts import TEMPLATE, make_tokenizer

WHOLE = Prompt("What?", "He likes", "Be brief.", (("Who?", "She likes tea."),))
ITEMS = pa.table(
    {"title": ["Heat", "Big", "Toys"], "attributes": [["genre: Crime"], ["genre: Comedy"], ["genre: Comedy"]]}
)
LLM, GENERATE = LLMSection(), GenerateSection()


def test_messages_of_a_prompt() -> None:
    assert messages(WHOLE) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "She likes tea."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "He likes"},
    ]
    assert messages(WHOLE, with_system=False)[0] == {"role": "user", "content": "Be brief.\n\nWho?"}


def test_a_chat_ends_inside_the_answer() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.decode(encode_prompt(tokenizer, WHOLE, "chat")) == (
        "<s><|system|>Be brief.<|end|><|user|>Who?<|end|><|assistant|>She likes tea.<|end|><|user|>What?<|end|>"
        "<|assistant|>He likes"
    )


def test_a_base_llm_goes_on_with_one_text() -> None:
    tokenizer = make_tokenizer(template=None)
    ids = encode_prompt(tokenizer, WHOLE, "completion")
    assert tokenizer.decode(ids) == "<s>Be brief.\n\nWho? She likes tea.\n\nWhat? He likes"
    assert tokenizer.decode(encode_prompt(tokenizer, Prompt("Likes: "), "completion")) == "<s>Likes:"
    assert tokenizer.decode(encode_prompt(tokenizer, Prompt("What?\n", "He"), "completion")) == "<s>What?\nHe"


def test_a_chat_llm_can_be_given_a_text_too() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.decode(encode_prompt(tokenizer, Prompt("A", "b"), "completion")) == "<s>A b"


def test_every_family_continues_its_own_answer(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    """The lead-in stands behind what opens an answer, the last tokens are its, and there is at most one BOS."""
    plain, led = (encode_prompt(chat_tokenizer, Prompt("What?", lead), "chat") for lead in ("", "He likes"))
    assert plain == encode_chat(chat_tokenizer, "What?")
    text = chat_tokenizer.decode(led)
    assert text.startswith(chat_tokenizer.decode(plain).rstrip()) and text.endswith("He likes")
    assert chat_tokenizer.bos_token_id is None or led.count(chat_tokenizer.bos_token_id) == 1


def test_every_family_sees_the_system_prompt_once(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    text = chat_tokenizer.decode(encode_prompt(chat_tokenizer, Prompt("What?", system="Be brief."), "chat"))
    assert text.count("Be brief.") == 1 and text.index("Be brief.") < text.index("What?")
    remarks = style_remarks(PromptSection(system="Be brief."), chat_tokenizer)
    assert bool(remarks) != takes_system(chat_tokenizer)


def test_a_template_that_swallows_the_system_prompt_is_found_out() -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages if m['role'] != 'system' %}" + TEMPLATE.split("%}", 1)[1]
    )
    assert not takes_system(tokenizer)
    assert "Be brief.\n\nWhat?" in tokenizer.decode(
        encode_prompt(tokenizer, Prompt("What?", system="Be brief."), "chat")
    )


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ({}, ""),
        ({"style": "chat"}, 'set prompt.style = "completion"'),
        ({"template": "{history}"}, "set prompt.lead_in"),
        ({"template": "{history} He likes", "lead_in": ""}, ""),
    ],
)
def test_a_base_llm_asked_in_chat_manner_is_remarked_upon(prompt: dict[str, str], said: str) -> None:
    found = style_remarks(PromptSection(**prompt), make_tokenizer(template=None))
    assert (said in found[0]) if said else not found
    assert not style_remarks(PromptSection(**prompt), make_tokenizer())


def test_the_style_follows_the_tokenizer() -> None:
    for template, style in ((None, "completion"), (TEMPLATE, "chat")):
        prompts = TokenizedPrompts(make_tokenizer(template), ITEMS, LLM, PromptSection(), GENERATE)
        assert prompts.catalogue.wording.style == style
    prompts = TokenizedPrompts(make_tokenizer(), ITEMS, LLM, PromptSection(style="completion"), GENERATE)
    assert prompts.catalogue.wording.style == "completion"


def test_nobody_is_an_example_to_himself() -> None:
    shown = [
        ExampleUser(7, "", [0, 1], [5.0, 2.0]),
        ExampleUser(8, "", [2], [4.0]),
        ExampleUser(9, "", [1], [1.0]),
    ]
    prompts = CataloguePrompts(ITEMS, (), PromptSection(examples=2), like_at=4, examples=shown)
    answers = {
        7: "This user likes Crime, such as Heat.",
        8: "This user likes Comedy, such as Toys.",
        9: "This user likes none of these.",
    }
    for user, others in ((7, [8, 9]), (8, [7, 9]), (1, [7, 8])):
        asked = prompts.asked("What?", user)
        assert [answer for _, answer in asked.examples] == [answers[other] for other in others]
    assert asked.examples[0][0].startswith('History: "Heat", 5 stars; "Big", 2 stars;')


def test_an_examples_answer_goes_on_from_the_lead_in() -> None:
    shown = [ExampleUser(7, "", [0], [5.0])] * 2
    prompts = CataloguePrompts(
        ITEMS, (), PromptSection(examples=1, lead_in="Taste:"), like_at=4, examples=shown
    )
    assert prompts.asked("What?").examples[0][1] == "Taste: Crime, such as Heat."
