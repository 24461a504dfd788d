"""One engine as the recipe describes it, and as vLLM's arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from dpo4rec_ray.config.texts import GenerateSection, LLMSection

# Measured on vLLM's CPU engine (benchmarks/bench.py generate): compilation costs half a minute, which pays only
# from about a million tokens per engine on. Without
# chunked prefill, a request's own seed gives the same samples again. With small blocks, a user's N samples share all but
# a few tokens of one prefill.
CPU_ENGINE = {"enforce_eager": True, "enable_chunked_prefill": False, "block_size": 32}
# What a recipe's engine_args cannot set, and where it is set instead.
OWN_ARGUMENTS = {
    "model": "llm.path",
    "dtype": "llm.dtype",
    "max_model_len": "llm.max_model_len",
    "tensor_parallel_size": "generate.tensor_parallel_size",
    "pipeline_parallel_size": "generate.pipeline_parallel_size",
    "distributed_executor_backend": "generate.distributed_executor_backend",
    "max_num_seqs": "generate.max_num_seqs",
    "gpu_memory_utilization": "generate.gpu_memory_utilization",
    "enable_lora": "llm.lora_mode",
    "logprobs_mode": "generate.token_logps",
    "max_lora_rank": "policy.lora_rank",
    "disable_log_stats": "nothing: the run's figures need it",
    "trust_remote_code": "nothing: it is off",
    "hf_token": "the environment variable HF_TOKEN: settings are written into reports and model cards",
}
LOAD_FORMATS = ("safetensors", "dummy")  # other formats can run code
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM takes for max_lora_rank


class ServedWeights(NamedTuple):
    """What an engine serves: a model folder, hub name or .gguf file, and the folder of a LoRA on it."""

    model: str
    lora: str | None = None


@dataclass(frozen=True)
class EngineSpec:
    """The sections of the recipe, and what exists at run time only.

    Attributes:
        generate: with one temperature (`Config.generate_by`).
        weights: what the engine serves at first; it can change over to others of the same shape.
        max_lora_rank: highest rank of the LoRAs that the engine may be asked to serve. 0: it takes none, and is faster.
        schema: JSON schema that every sample has to follow. None: free text.
    """

    weights: ServedWeights
    llm: LLMSection
    generate: GenerateSection
    max_lora_rank: int = 0
    schema: dict[str, Any] | None = None

    @property
    def on_gpu(self) -> bool:
        return self.generate.gpus_per_engine > 0

    @property
    def fixed(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
        """What a running engine cannot change. Beside it, the weights must have the same shape."""
        return self.arguments() | {"model": ""}, self.sampling(), self.schema

    def sampling(self) -> dict[str, Any]:
        """How samples are drawn, as vLLM's SamplingParams takes it."""
        section = self.generate
        return {
            "temperature": section.temperature,
            "top_p": section.top_p,
            "top_k": section.top_k,
            "min_p": section.min_p,
            "repetition_penalty": section.repetition_penalty,
            "presence_penalty": section.presence_penalty,
            # Cut off the text, while its tokens stay: DPO trains on these and must see where a text ends.
            "stop": list(section.stop),
            "max_tokens": section.max_new_tokens,
            # Of the drawn token alone.
            "logprobs": 0 if section.token_logps else None,
        }

    def arguments(self) -> dict[str, Any]:
        """The engine, as vLLM's EngineArgs takes it."""
        section = self.generate
        chosen: dict[str, Any] = {
            "model": self.weights.model,
            "dtype": self.llm.dtype,
            "max_model_len": self.llm.max_model_len,
            "load_format": "safetensors",
            "disable_log_stats": False,
            "enable_prefix_caching": True,
            "max_num_seqs": section.max_num_seqs,
            # JSON without spaces: small LLMs spend their tokens on line breaks where they may. This is an argument of the
            # engine because xgrammar does not look for it in a request's own parameters.
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        }
        if section.token_logps:
            chosen["logprobs_mode"] = "processed_logprobs"  # of the distribution at the temperature
        if self.on_gpu:
            chosen["gpu_memory_utilization"] = section.gpu_memory_utilization
        else:
            chosen |= {**CPU_ENGINE, "max_num_batched_tokens": max(4096, self.llm.max_model_len)}
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(section, name) > 1:
                chosen[name] = getattr(section, name)
        if section.processes_per_engine > 1:
            chosen["distributed_executor_backend"] = section.distributed_executor_backend
        if self.max_lora_rank:
            rank = next(rank for rank in LORA_RANKS if rank >= self.max_lora_rank)
            chosen |= {"enable_lora": True, "max_lora_rank": rank}
        return chosen | section.engine_args
