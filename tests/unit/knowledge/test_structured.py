"""JSON with one string per factor: the schema by itself, and the bundled LLM held to it by the real engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from dpo4rec_ray.config.texts import GenerateSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.completions import Answer, Completion
from dpo4rec_ray.knowledge.generator import VLLMGenerator
from dpo4rec_ray.knowledge.prompts import encode_chat
from dpo4rec_ray.knowledge.structured import as_sentences, factor_schema, read_samples
from dpo4rec_ray.knowledge.wording import FACTORS
from dpo4rec_ray.policy.model import load_tokenizer
from tests.unit.knowledge.asking import ask

SHORT = FACTORS["short"]
MAX_NEW_TOKENS = 96


def text_of(**values: object) -> str:
    return json.dumps(values)


# Without an engine ----------------------------------------------------------------------------------------------------


def test_the_schema_takes_exactly_one_string_per_factor() -> None:
    schema = factor_schema(SHORT, MAX_NEW_TOKENS)
    jsonschema.Draft202012Validator.check_schema(schema)
    valid = jsonschema.Draft202012Validator(schema).is_valid
    good = {"genre": " comedy, the 七人 kind; it's fun", "era": "x", "creator": "é"}
    assert valid(good)
    for wrong in (
        {"genre": "a", "era": "b"},
        {**good, "mood": "c"},
        {**good, "era": 5},
        *(
            {**good, "era": value}
            for value in ("", " ", "  a", 'a"b', "a\\b", "a\nb", "\x11", "a\x85", "x" * 400)
        ),
    ):
        assert not valid(wrong), wrong


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("max_new_tokens", [160, 256, 512, 4096])
def test_the_longest_object_has_three_characters_a_token(factors: str, max_new_tokens: int) -> None:
    schema = factor_schema(FACTORS[factors], max_new_tokens)
    pattern = schema["properties"][FACTORS[factors][0]]["pattern"]
    longest = max(size for size in range(500) if re.search(pattern, "x" * size))
    whole = json.dumps(dict.fromkeys(FACTORS[factors], "x" * longest), separators=(",", ":"))
    assert len(whole) <= 3 * max_new_tokens
    assert longest >= 380 or len(whole) > 2 * max_new_tokens


def test_too_few_tokens_for_the_factors_are_refused() -> None:
    with pytest.raises(UserError, match=r"generate\.max_new_tokens 64: .* 9 factors; raise it"):
        factor_schema(FACTORS["movies"], 64)


def test_json_becomes_sentences() -> None:
    text = text_of(genre=" likes\n comedies. ", era="1990s", creator="Okafor")
    assert as_sentences(text, SHORT) == "genre: likes comedies. era: 1990s. creator: Okafor."


@pytest.mark.parametrize(
    "text",
    [
        "genre: comedy",
        "",
        "[]",
        '"genre"',
        text_of(genre="a", era="b", creator="c")[:-2],
        text_of(genre="a", era="b"),
        text_of(genre="a", era="b", creator="c", mood="d"),
        text_of(era="b", genre="a", creator="c"),
        text_of(genre="a", era=1990, creator="c"),
        text_of(genre="a", era=" ", creator="c"),
        text_of(genre="a", era=" ...", creator="c"),
    ],
)
def test_what_is_not_the_json_asked_for_is_told_apart(text: str) -> None:
    assert as_sentences(text, SHORT) is None


def test_read_samples_counts_the_invalid_and_leaves_them_as_they_are() -> None:
    good = Completion([1, 2], text_of(genre="a", era="b", creator="c"), "stop")
    clipped = Completion([3], '{"genre":"a', "length")
    kept, invalid = read_samples([clipped, good, clipped], SHORT)
    assert invalid == 2
    assert kept == [clipped, Completion([1, 2], "genre: a. era: b. creator: c.", "stop"), clipped]


# The engine -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(bundled: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(str(bundled))
    return [
        encode_chat(
            tokenizer,
            ask("", [f"Silent Harbor {i}", "Iron Mirror"], [5.0, 2.0], None, SHORT, as_json=True),
        )
        for i in range(8)
    ]


SEEDS = list(range(0, 800, 100))


@pytest.fixture(scope="module")
def held(start_engine: Callable[..., VLLMGenerator], bundled: Path) -> VLLMGenerator:
    schema = factor_schema(SHORT, MAX_NEW_TOKENS)
    return start_engine(bundled, GenerateSection(max_new_tokens=MAX_NEW_TOKENS), schema=schema)


@pytest.fixture(scope="module")
def answers(held: VLLMGenerator, prompts: list[list[int]]) -> list[Answer]:
    return held.generate(prompts, SEEDS, [8] * 8)


@pytest.mark.vllm
def test_every_sample_that_ends_is_valid_json_and_nearly_all_end(answers: list[Answer]) -> None:
    schema = factor_schema(SHORT, MAX_NEW_TOKENS)
    samples = [sample for answer in answers for sample in answer.samples]
    assert len(samples) == 64
    for sample in samples:
        if sample.finish_reason == "stop":
            found = json.loads(sample.text)
            jsonschema.validate(found, schema)
            assert list(found) == list(SHORT)
            assert sample.text == json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    # a small model finds no end to a string by itself; the bound ends it for it
    assert sum(sample.finish_reason == "length" for sample in samples) <= 3
    assert len({sample.text for sample in samples}) > 56


@pytest.mark.vllm
def test_its_samples_become_sentences_and_clipped_ones_are_counted(answers: list[Answer]) -> None:
    for answer in answers:
        kept, invalid = read_samples(answer.samples, SHORT)
        assert invalid == sum(sample.finish_reason == "length" for sample in answer.samples)
        for before, after in zip(answer.samples, kept, strict=True):
            assert after.token_ids == before.token_ids
            assert before.finish_reason == "length" or re.fullmatch(
                r"genre: .+\. era: .+\. creator: .+\.", after.text
            )


@pytest.mark.vllm
def test_seeds_repeat(held: VLLMGenerator, prompts: list[list[int]], answers: list[Answer]) -> None:
    assert held.generate(prompts[::-1], SEEDS[::-1], [8] * 8)[::-1] == answers


@pytest.mark.vllm
def test_free_text_of_another_engine_in_turns(
    held: VLLMGenerator,
    prompts: list[list[int]],
    answers: list[Answer],
    start_engine: Callable[..., VLLMGenerator],
    bundled: Path,
) -> None:
    free = start_engine(bundled, GenerateSection(max_new_tokens=MAX_NEW_TOKENS))
    texts = [one.text for one in free.generate(prompts[:1], SEEDS[:1], [8])[0].samples]
    assert all(as_sentences(text, SHORT) is None for text in texts)
    assert held.generate(prompts[:1], SEEDS[:1], [8]) == answers[:1]
    assert [one.text for one in free.generate(prompts[:1], SEEDS[:1], [8])[0].samples] == texts


@pytest.mark.vllm
def test_a_schema_that_cannot_be_compiled_is_an_engine_error(
    start_engine: Callable[..., VLLMGenerator], bundled: Path, prompts: list[list[int]]
) -> None:
    schema = factor_schema(SHORT)
    for value in schema["properties"].values():
        value["pattern"] = '^[^"\\\\\\x00-\\x1f]{0,300}$'  # one repeat, too long for xgrammar
    generator = start_engine(bundled, GenerateSection(max_new_tokens=16), schema=schema)
    [answer] = generator.generate(prompts[:1], [0], [2])
    assert (answer.samples, answer.reason) == ([], "engine_error")
