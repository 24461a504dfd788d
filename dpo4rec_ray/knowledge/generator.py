"""Prompt token ids in, N completions with their token ids out: vLLM in this process, the same class on CPU and GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# What is measured to be fastest and repeatable on vLLM's CPU engine: no compilation, and no chunked prefill, because
# a request's own seed does not survive it there. One prefill serves a user's N samples.
CPU_ENGINE = {"enforce_eager": True, "enable_chunked_prefill": False}


@dataclass(frozen=True)
class Completion:
    """One sample. `token_ids` are what the engine produced, EOS included; they are what DPO trains on."""

    token_ids: list[int]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn."""

    temperature: float = 0.9
    top_p: float = 0.95
    max_new_tokens: int = 256


@dataclass(frozen=True)
class EngineSettings:
    """What the engine loads and how much memory it may take."""

    model: str
    adapter: str | None = None
    dtype: str = "float32"
    max_model_len: int = 1024
    on_gpu: bool = False
    gpu_memory_utilization: float = 0.9
    max_lora_rank: int = 16
    extra: dict[str, Any] = field(default_factory=dict)


class VLLMGenerator:
    """vLLM's synchronous engine inside this process. Set the engine's environment before the process starts."""

    def __init__(self, engine: EngineSettings, sampling: Sampling):
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        arguments: dict[str, Any] = {
            "model": engine.model,
            "dtype": engine.dtype,
            "max_model_len": engine.max_model_len,
            "load_format": "safetensors",  # other weight formats can run code
            "disable_log_stats": True,
            "enable_prefix_caching": True,
        }
        if engine.on_gpu:
            arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
        else:
            arguments |= {**CPU_ENGINE, "max_num_batched_tokens": max(4096, engine.max_model_len)}
        if engine.adapter:
            arguments |= {"enable_lora": True, "max_lora_rank": engine.max_lora_rank}
        self._llm = LLM(**(arguments | engine.extra))
        self._lora = LoRARequest("policy", 1, engine.adapter) if engine.adapter else None
        self._sampling = sampling
        self._max_prompt = engine.max_model_len - sampling.max_new_tokens

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], num_samples: Sequence[int]
    ) -> list[list[Completion]]:
        """Sample; a prompt that leaves no room for max_new_tokens gets an empty list."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        fits = [i for i, prompt in enumerate(prompts) if len(prompt) <= self._max_prompt]
        params = [
            SamplingParams(
                n=num_samples[i],
                seed=seeds[i],
                temperature=self._sampling.temperature,
                top_p=self._sampling.top_p,
                max_tokens=self._sampling.max_new_tokens,
                skip_special_tokens=True,
            )
            for i in fits
        ]
        answers: list[list[Completion]] = [[] for _ in prompts]
        if not fits:
            return answers
        requests = [TokensPrompt(prompt_token_ids=prompts[i]) for i in fits]
        outputs = self._llm.generate(requests, params, use_tqdm=False, lora_request=self._lora)
        for i, output in zip(fits, outputs, strict=True):
            answers[i] = [
                Completion(list(sample.token_ids), sample.text, str(sample.finish_reason))
                for sample in output.outputs
            ]
        return answers
