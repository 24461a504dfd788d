"""The engine behind `VLLMGenerator`, on the bundled LLM: seeds, overlapping calls, refusals, a change of weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from dpo4rec_ray.config import default_config
from dpo4rec_ray.config.texts import GenerateSection
from dpo4rec_ray.config.training import PolicySection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge import generator as module
from dpo4rec_ray.knowledge.catalogue_prompts import TokenizedPrompts
from dpo4rec_ray.knowledge.completions import Answer
from dpo4rec_ray.knowledge.generator import VLLMGenerator
from dpo4rec_ray.knowledge.prompts import encode_chat
from dpo4rec_ray.knowledge.wording import FACTORS
from dpo4rec_ray.policy.model import add_lora, load_model, load_tokenizer, save_complete, save_merged
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.texts.policy_texts import PolicyTexts
from dpo4rec_ray.texts.text_source import catalogue
from tests.unit.knowledge.asking import ask

pytestmark = pytest.mark.vllm

SAMPLING = GenerateSection(max_new_tokens=32)
# A recipe cannot ask for temperature 0; a copy is not checked.
GREEDY = GenerateSection(max_new_tokens=24).model_copy(update={"temperature": 0.0})
MAX_MODEL_LEN = 256
NUM_PROMPTS, NUM_SAMPLES = 12, 4
SEEDS = list(range(0, 100 * NUM_PROMPTS, 100))
COUNTS = [NUM_SAMPLES] * NUM_PROMPTS
Start = Callable[..., VLLMGenerator]


@pytest.fixture(scope="module")
def prompts(bundled: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(str(bundled))
    titles = [f"Silent Harbor {i}" for i in range(NUM_PROMPTS)]
    return [
        encode_chat(tokenizer, ask("", titles[:num], [5.0] * num, None, FACTORS["short"]))
        for num in range(1, NUM_PROMPTS + 1)
    ]


@pytest.fixture(scope="module")
def generator(start_engine: Start, bundled: Path) -> VLLMGenerator:
    return start_engine(bundled, SAMPLING, max_model_len=MAX_MODEL_LEN)


@pytest.fixture(scope="module")
def answers(generator: VLLMGenerator, prompts: list[list[int]]) -> list[Answer]:
    """What the rest is compared with: all prompts in one call."""
    return generator.generate(prompts, SEEDS, COUNTS)


@pytest.fixture(scope="module")
def perturbed(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled LLM with other weights of the same shape."""
    model = load_model(str(bundled), "float32")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    target = tmp_path_factory.mktemp("policies") / "perturbed"
    save_complete(model, str(bundled), target)
    return target


@pytest.fixture(scope="module")
def lora(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that changes what the bundled LLM says."""
    torch.manual_seed(1)
    model = add_lora(load_model(str(bundled), "float32"), PolicySection(lora_rank=8, lora_alpha=16))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("policies") / "lora"
    model.save_pretrained(folder)
    return folder


def test_every_prompt_gets_its_number_of_different_samples(answers: list[Answer]) -> None:
    assert [len(answer.samples) for answer in answers] == COUNTS
    assert all(0 < len(sample.token_ids) <= 32 for answer in answers for sample in answer.samples)
    texts = {sample.text for answer in answers for sample in answer.samples}
    assert len(texts) > NUM_PROMPTS * NUM_SAMPLES * 3 // 4


def test_seeds_repeat_in_another_order_and_one_by_one(
    generator: VLLMGenerator, prompts: list[list[int]], answers: list[Answer]
) -> None:
    backwards = generator.generate(prompts[::-1], SEEDS[::-1], COUNTS)
    assert backwards[::-1] == answers
    single = [
        generator.generate([prompt], [seed], [NUM_SAMPLES])[0]
        for prompt, seed in zip(prompts, SEEDS, strict=True)
    ]
    assert single == answers


def test_a_stop_string_ends_text_and_tokens(
    start_engine: Start, bundled: Path, prompts: list[list[int]], answers: list[Answer]
) -> None:
    """The text ends before the string. The tokens end with those of the string: DPO sees where the text is to end."""
    tokenizer = load_tokenizer(str(bundled))
    stopping = start_engine(
        bundled, SAMPLING.model_copy(update={"stop": ("drama",)}), max_model_len=MAX_MODEL_LEN
    )
    found = stopping.generate(prompts, SEEDS, COUNTS)
    stopped = 0
    for answer, free in zip(found, answers, strict=True):
        for sample, whole in zip(answer.samples, free.samples, strict=True):
            assert whole.token_ids[: len(sample.token_ids)] == sample.token_ids
            if "drama" in whole.text:
                stopped += 1
                assert sample.text == whole.text.partition("drama")[0]
                assert sample.finish_reason == "stop"
                assert tokenizer.decode(sample.token_ids).endswith("drama")
            else:
                assert sample == whole
    assert stopped


def test_another_seed_gives_other_samples(
    generator: VLLMGenerator, prompts: list[list[int]], answers: list[Answer]
) -> None:
    others = generator.generate(prompts, [seed + 50 for seed in SEEDS], COUNTS)
    assert all(other != answer for other, answer in zip(others, answers, strict=True))


def test_seeds_repeat_when_calls_of_many_threads_overlap(
    generator: VLLMGenerator, prompts: list[list[int]], answers: list[Answer]
) -> None:
    together = threading.Barrier(4)

    def ask(worker: int) -> list[list[Answer]]:
        together.wait()
        chosen = list(range(worker, NUM_PROMPTS, 4))
        return [
            generator.generate(
                [prompts[i] for i in chosen], [SEEDS[i] for i in chosen], [NUM_SAMPLES] * len(chosen)
            )
            for _ in range(3)
        ]

    with ThreadPoolExecutor(4) as pool:
        for worker, rounds in enumerate(pool.map(ask, range(4))):
            assert rounds == [answers[worker::4]] * 3


def test_a_refused_request_costs_only_itself(
    generator: VLLMGenerator, prompts: list[list[int]], answers: list[Answer]
) -> None:
    asked = [prompts[0], [1, 10**6], prompts[1]]  # no token has that id
    first, refused, second = generator.generate(asked, [SEEDS[0], 7, SEEDS[1]], [NUM_SAMPLES] * 3)
    assert [first, second] == answers[:2]
    assert (refused.samples, refused.reason) == ([], "engine_error")
    assert "1000000" in refused.detail or "vocab" in refused.detail


def test_the_longest_prompt_that_leaves_room_is_taken_and_no_longer_one(generator: VLLMGenerator) -> None:
    room = MAX_MODEL_LEN - SAMPLING.max_new_tokens
    fits, too_long = [1, *[10] * (room - 1)], [1, *[10] * room]
    taken, refused = generator.generate([fits, too_long], [0, 0], [2, 2])
    assert len(taken.samples) == 2
    assert refused == Answer([], "prompt_too_long", "225 tokens, room for 224")


def test_nothing_asked_nothing_answered(generator: VLLMGenerator) -> None:
    assert generator.generate([], [], []) == []


def test_figures_are_those_of_the_work_done(
    start_engine: Start, bundled: Path, prompts: list[list[int]]
) -> None:
    began = time.monotonic()
    few = SAMPLING.model_copy(update={"max_num_seqs": 16})
    generator = start_engine(bundled, few, max_model_len=MAX_MODEL_LEN)
    assert generator.stats().samples == 0
    first, samples, tokens = time.monotonic(), 0, 0
    while time.monotonic() - first < 2.5:  # the engine's own gauges are read once a second
        for answer in generator.generate(prompts, SEEDS, COUNTS):
            samples += len(answer.samples)
            tokens += sum(len(sample.token_ids) for sample in answer.samples)
    span = time.monotonic() - first
    stats = generator.stats()
    assert (stats.samples, stats.tokens) == (samples, tokens)
    assert 0 < stats.start_s < first - began + 0.1
    assert span - 0.2 < stats.span_s <= span
    assert 0.8 < stats.busy <= 1.0
    assert 1 < stats.running <= 16
    assert 0 < stats.kv_cache < 1
    # N samples share one prefill: of a prompt's whole blocks at most one in N is computed
    assert 0.3 < stats.prefix_hits < 1


def test_use_changes_the_weights_and_back(
    generator: VLLMGenerator,
    prompts: list[list[int]],
    answers: list[Answer],
    perturbed: Path,
    bundled: Path,
    start_engine: Start,
) -> None:
    generator.use(str(perturbed))
    changed = generator.generate(prompts, SEEDS, COUNTS)
    generator.use(str(bundled))
    back = generator.generate(prompts, SEEDS, COUNTS)
    fresh = start_engine(perturbed, SAMPLING, max_model_len=MAX_MODEL_LEN)
    assert all(one != other for one, other in zip(changed, answers, strict=True))
    assert changed == fresh.generate(prompts, SEEDS, COUNTS)
    assert back == answers


def test_use_waits_for_calls_under_way(
    generator: VLLMGenerator,
    prompts: list[list[int]],
    answers: list[Answer],
    perturbed: Path,
    bundled: Path,
) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generator.generate, prompts, SEEDS, COUNTS)
        time.sleep(0.02)
        generator.use(str(perturbed))
        assert running.result(timeout=1) == answers
    generator.use(str(bundled))


def test_a_change_that_fails_is_taken_for_neither(
    generator: VLLMGenerator,
    prompts: list[list[int]],
    answers: list[Answer],
    perturbed: Path,
    bundled: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A policy whose files cannot be fetched leaves the old weights; one that breaks off while it is read is read anew."""

    def away(_: object) -> Path:
        raise OSError("the store is away")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the store is away"):
        patch.setattr(module, "local_copy", away)
        generator.use(str(perturbed), "s3://bucket/lora")
    assert generator.generate(prompts, SEEDS, COUNTS) == answers

    def breaks_off(*_: object, **__: object) -> None:
        raise ValueError("header too large")

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="could not be read: header too large"),
    ):
        patch.setattr(generator._llm, "collective_rpc", breaks_off)
        generator.use(str(perturbed))
    generator.use(str(bundled))  # which it may not take for what it serves
    assert generator.generate(prompts, SEEDS, COUNTS) == answers


def test_a_lora_says_what_the_merged_model_says(
    start_engine: Start,
    bundled: Path,
    lora: Path,
    prompts: list[list[int]],
    tmp_path: Path,
) -> None:
    merged = tmp_path / "merged"
    save_merged(str(bundled), str(lora), merged, "float32")
    plain = start_engine(bundled, GREEDY, max_model_len=MAX_MODEL_LEN)
    one_each = [1] * NUM_PROMPTS
    base = plain.generate(prompts, SEEDS, one_each)
    plain.use(str(merged))
    expected = plain.generate(prompts, SEEDS, one_each)
    assert all(one != other for one, other in zip(base, expected, strict=True))

    served = start_engine(bundled, GREEDY, max_model_len=MAX_MODEL_LEN, max_lora_rank=8)
    assert served.generate(prompts, SEEDS, one_each) == base
    served.use(str(bundled), str(lora))
    assert served.generate(prompts, SEEDS, one_each) == expected
    served.use(str(bundled))
    assert served.generate(prompts, SEEDS, one_each) == base


# A user's prompt through `PolicyTexts` --------------------------------------------------------------------------------

NUM_ITEMS = 40


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run folder with a catalogue and nothing else. Item 7's title is absurd."""
    store = RunDir(tmp_path_factory.mktemp("run"))
    ids = list(range(NUM_ITEMS))
    table = {
        "item_id": ids,
        "raw_id": [str(i) for i in ids],
        "title": ["<|end|>" * 2000 if i == 7 else f"Silent Harbor {i}" for i in ids],
        "attributes": [[f"genre: {('comedy', 'drama')[i % 2]}"] for i in ids],
    }
    store.start("items")
    store.write("items", pa.table(table))
    store.finish(Manifest("items", "", NUM_ITEMS))
    return store


def user(num_events: int, profile: str = "") -> dict[str, object]:
    """A row of `users` with the last `num_events` items but item 7 as history."""
    items = [item for item in range(NUM_ITEMS) if item != 7][-num_events:] if num_events else []
    history = {"history_item_ids": items, "history_ratings": [4.0] * num_events}
    return {"user_id": num_events, "profile": profile, **history}


def test_a_long_history_is_shortened_to_the_token(
    generator: VLLMGenerator, store: RunDir, bundled: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(bundled))
    config = default_config(
        [
            "prompt.factors=short",
            "prompt.item_attributes=true",
            f"llm.max_model_len={MAX_MODEL_LEN}",
            "generate.max_new_tokens=32",
        ]
    )
    prompts = TokenizedPrompts(tokenizer, catalogue(store), config.llm, config.prompt, config.generate)
    texts = PolicyTexts(prompts, generator, tmp_path / "reason.txt")
    room = MAX_MODEL_LEN - SAMPLING.max_new_tokens

    def ids(row: dict[str, Any], skip: int) -> list[int]:
        kept = row["history_item_ids"][skip:]
        titles = [f"Silent Harbor {item}" for item in kept]
        attributes = [[f"genre: {('comedy', 'drama')[item % 2]}"] for item in kept]
        text = ask(row["profile"], titles, [4.0] * len(kept), attributes, FACTORS["short"])
        return encode_chat(tokenizer, text)

    rows = [user(0), user(3), user(20), user(30, "a student"), user(39)]
    found = texts.users(rows, [1, 2, 3, 4, 5], [2] * 5)
    shortened = 0
    for row, one in zip(rows, found, strict=True):
        num_events = len(row["history_item_ids"])
        fewest = next(skip for skip in range(num_events + 1) if len(ids(row, skip)) <= room)
        assert one.reason == ""
        assert len(one.samples) == 2
        assert one.num_left_out == fewest
        assert one.prompt_token_ids == ids(row, fewest)
        shortened += fewest > 0
    assert shortened >= 2
    assert found[0].num_left_out == found[1].num_left_out == 0

    # an absurd title is cut, and costs its user neither the events before it nor those after
    absurd = user(3) | {"history_item_ids": [5, 7, 9]}
    [one] = texts.users([absurd], [6], [1])
    assert (one.reason, len(one.samples)) == ("", 1)
    prompt = tokenizer.decode(one.prompt_token_ids)
    assert prompt.count("<|end|>") == 0
    assert '"Silent Harbor 9"' in prompt
