from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from dpo4rec_ray.config import default_config
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
        with_generate(top_k=50),
        with_generate(min_p=0.1),
        with_generate(repetition_penalty=1.1),
        with_generate(presence_penalty=0.5),
        with_generate(stop=["\n"]),
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


def test_vllm_takes_every_sampling_setting() -> None:
    """Their names and ranges are vLLM's: each bound of the recipe's keys is a value that its own checks let through."""
    from vllm import SamplingParams

    low = {"temperature": 0.01, "top_p": 0.01, "min_p": 0, "repetition_penalty": 0.01, "presence_penalty": -2}
    high = {
        "temperature": 2,
        "top_p": 1,
        "top_k": 9,
        "min_p": 1,
        "repetition_penalty": 2,
        "presence_penalty": 2,
    }
    for chosen in ({}, low, high | {"stop": ["\n", "User:"]}):
        params = SamplingParams(**with_generate(**chosen).sampling())
        assert {name: getattr(params, name) for name in chosen} == chosen
        assert not params.include_stop_str_in_output


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0},
        {"temperature": 2.1},
        {"temperature": []},
        {"temperature": [1.0, 0.0]},
        {"top_k": -1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"presence_penalty": 2.5},
        {"stop": [""]},
    ],
)
def test_what_no_engine_could_sample_with_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        GenerateSection(**wrong)


def test_a_list_of_temperatures_has_one_per_policy_and_the_last_holds_on() -> None:
    def temperatures(*changes: str) -> list[Any]:
        config = default_config(list(changes))
        return [config.generate_by(policy).temperature for policy in range(5)]

    several = "generate.temperature=[1.0, 0.8, 0.6]"
    assert temperatures(several) == [1.0, 0.8, 0.6, 0.6, 0.6]
    assert temperatures("generate.temperature=0.7") == [0.7] * 5
    # one per round, not per turn
    assert temperatures(several, "run.turns_per_round=2") == [1.0, 1.0, 0.8, 0.8, 0.6]


@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_processes_of_an_engine_run_where_the_recipe_says(backend: str) -> None:
    spec = with_generate(
        tensor_parallel_size=4,
        pipeline_parallel_size=2,
        gpus_per_engine=8,
        distributed_executor_backend=backend,
    )
    chosen = spec.arguments()
    assert (chosen["tensor_parallel_size"], chosen["pipeline_parallel_size"]) == (4, 2)
    assert chosen["distributed_executor_backend"] == backend
    assert spec.generate.over_nodes == (backend == "ray")
    alone = with_generate(gpus_per_engine=1, distributed_executor_backend=backend)
    assert "distributed_executor_backend" not in alone.arguments() and not alone.generate.over_nodes
