from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dpo4rec_ray.config.texts import GenerateSection, LLMSection
from dpo4rec_ray.knowledge.engine_spec import EngineSpec, ServedWeights

SPEC = EngineSpec(ServedWeights("model"), LLMSection(), GenerateSection())


def with_generate(**changes: Any) -> EngineSpec:
    return replace(SPEC, generate=GenerateSection(**changes))


@pytest.mark.parametrize(
    "other",
    [
        with_generate(temperature=0.5),
        with_generate(top_p=0.5),
        with_generate(max_new_tokens=64),
        with_generate(max_num_seqs=8),
        with_generate(tensor_parallel_size=2),
        with_generate(pipeline_parallel_size=2),
        with_generate(gpus_per_engine=1),
        with_generate(engine_args={"block_size": 16}),
        replace(SPEC, llm=LLMSection(dtype="bfloat16")),
        replace(SPEC, llm=LLMSection(max_model_len=512)),
        replace(SPEC, max_lora_rank=8),
        replace(SPEC, schema={"type": "object"}),
    ],
)
def test_what_a_running_engine_cannot_change_compares_unequal(other: EngineSpec) -> None:
    assert other.fixed != SPEC.fixed


@pytest.mark.parametrize(
    "other",
    [
        replace(SPEC, weights=ServedWeights("another", "lora")),
        replace(SPEC, llm=LLMSection(path="another", lora_mode="merged")),
        with_generate(num_samples=3, user_frac=0.5, users_per_shard=8, stall_timeout_s=9),
    ],
)
def test_weights_and_what_the_engine_does_not_see_compare_equal(other: EngineSpec) -> None:
    assert other.fixed == SPEC.fixed


def test_an_engine_takes_loras_only_if_asked_to() -> None:
    assert "enable_lora" not in SPEC.arguments()
    arguments = replace(SPEC, max_lora_rank=9).arguments()
    assert (arguments["enable_lora"], arguments["max_lora_rank"]) == (True, 16), "vLLM's next higher rank"


def test_engine_args_come_last() -> None:
    assert with_generate(engine_args={"enforce_eager": False}).arguments()["enforce_eager"] is False
