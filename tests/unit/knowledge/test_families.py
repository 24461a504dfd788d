"""Models of every family through the real engine: one BOS, ids that are the text, an end of turn, no thinking aloud."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dpo4rec_ray.config.texts import GenerateSection
from dpo4rec_ray.knowledge.completions import Answer
from dpo4rec_ray.knowledge.generator import VLLMGenerator
from dpo4rec_ray.knowledge.prompts import encode_chat
from dpo4rec_ray.knowledge.wording import FACTORS
from dpo4rec_ray.policy.model import load_model, load_tokenizer, save_complete
from tests.unit.knowledge.asking import ask

pytestmark = pytest.mark.vllm

MAX_NEW_TOKENS = 64
SAMPLING = GenerateSection(temperature=1.0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS)
QUESTIONS = [
    ask("a student", ["Toy Story (1995)", "Heat (1995)"], [5.0, 3.5], None, FACTORS["short"]),
    ask("", ["七人の侍", "Амели 🎬"], [4.0, 1.0], None, FACTORS["short"]),
]
# What each family's template makes of a question, with the control tokens in their places.
EXPECTED = {
    "llama": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] {}[/INST]",
    "yi": "<|startoftext|><|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "qwen2.5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "qwen3": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "gemma": "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
}
END_OF_TURN = {
    "llama": "<|eot_id|>",
    "mistral": "</s>",
    "yi": "<|im_end|>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "gemma": "<end_of_turn>",
}


@dataclass(frozen=True)
class Answered:
    """A family's answers to the questions: 4 and 8 samples."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    answers: list[Answer]
    generator: VLLMGenerator


@pytest.fixture(scope="module", params=list(EXPECTED))
def answered(
    request: pytest.FixtureRequest,
    family_folder: Callable[[str], Path],
    start_engine: Callable[..., VLLMGenerator],
) -> Iterator[tuple[str, Answered]]:
    folder = family_folder(request.param)
    tokenizer = load_tokenizer(str(folder))
    generator = start_engine(folder, SAMPLING)
    prompts = [encode_chat(tokenizer, question) for question in QUESTIONS]
    answers = generator.generate(prompts, [11, 2000], [4, 8])
    yield request.param, Answered(folder, tokenizer, prompts, answers, generator)


def test_the_prompt_is_what_the_template_writes_and_decodes_to_it(answered: tuple[str, Answered]) -> None:
    name, found = answered
    for question, prompt in zip(QUESTIONS, found.prompts, strict=True):
        assert found.tokenizer.decode(prompt) == EXPECTED[name].format(question)


def test_exactly_one_bos_where_the_family_has_one(answered: tuple[str, Answered]) -> None:
    name, found = answered
    bos = found.tokenizer.bos_token_id
    assert (bos is None) == name.startswith("qwen")
    if bos is not None:
        assert all(prompt[0] == bos and prompt.count(bos) == 1 for prompt in found.prompts)


def test_n_different_samples_whose_ids_are_their_text(answered: tuple[str, Answered]) -> None:
    _, found = answered
    assert [len(answer.samples) for answer in found.answers] == [4, 8]
    for answer in found.answers:
        assert answer.reason == ""
        assert len({tuple(sample.token_ids) for sample in answer.samples}) > len(answer.samples) // 2
        for sample in answer.samples:
            decoded = found.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
            # of bytes that end inside a character, vLLM may hold back what `decode` shows as replacement marks
            assert sample.text.rstrip("�") == decoded.rstrip("�")


def test_a_sample_ends_at_the_end_of_turn_or_at_the_limit(answered: tuple[str, Answered]) -> None:
    name, found = answered
    stops = json.loads((found.folder / "generation_config.json").read_text())["eos_token_id"]
    samples = [sample for answer in found.answers for sample in answer.samples]
    for sample in samples:
        assert not set(sample.token_ids[:-1]) & set(stops)
        assert sample.finish_reason == ("stop" if sample.token_ids[-1] in stops else "length")
        assert sample.finish_reason == "stop" or len(sample.token_ids) == MAX_NEW_TOKENS
    ends = {found.tokenizer.convert_ids_to_tokens(sample.token_ids[-1]) for sample in samples}
    assert END_OF_TURN[name] in ends
    assert END_OF_TURN[name] not in "".join(sample.text for sample in samples)


def test_the_same_seeds_give_the_same_samples(answered: tuple[str, Answered]) -> None:
    _, found = answered
    again = found.generator.generate(found.prompts[::-1], [2000, 11], [8, 4])
    assert again[::-1] == found.answers


def test_weights_read_into_the_running_engine_are_those_of_a_fresh_one(
    answered: tuple[str, Answered], start_engine: Callable[..., VLLMGenerator], tmp_path: Path
) -> None:
    _, found = answered
    torch.manual_seed(0)
    model = load_model(str(found.folder), "float32")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * weight.std().nan_to_num() * torch.randn_like(weight))
    save_complete(model, str(found.folder), tmp_path / "other")
    found.generator.use(str(tmp_path / "other"))
    try:
        reloaded = found.generator.generate(found.prompts, [11, 2000], [4, 8])
    finally:
        found.generator.use(str(found.folder))
    fresh = start_engine(tmp_path / "other", SAMPLING)
    assert all(one != other for one, other in zip(reloaded, found.answers, strict=True))
    assert reloaded == fresh.generate(found.prompts, [11, 2000], [4, 8])
    assert found.generator.generate(found.prompts, [11, 2000], [4, 8]) == found.answers


def test_templates_without_a_system_role_are_not_given_one(family_folder: Callable[[str], Path]) -> None:
    for name in ("mistral", "gemma"):
        tokenizer = load_tokenizer(str(family_folder(name)))
        with pytest.raises(Exception, match=r"[Ss]ystem|roles"):
            tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)
