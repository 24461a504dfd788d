"""Prompt token ids in, N completions with their token ids out: one vLLM engine in this process, on CPU and GPU.

Callers overlap: `generate` may be called from several threads, each for the users of one shard. (vLLM's AsyncLLM does the
same but needs a process of its own, which on CPU makes the start four times as long.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from dpo4rec_ray.errors import UserError, first_line
from dpo4rec_ray.knowledge.catalogue_prompts import max_prompt_tokens
from dpo4rec_ray.knowledge.completions import Answer
from dpo4rec_ray.knowledge.engine_loop import EngineLoop, EngineStats, Request
from dpo4rec_ray.knowledge.engine_spec import EngineSpec, ServedWeights
from dpo4rec_ray.models.gguf_folder import model_folder
from dpo4rec_ray.storage.local_copies import local_copy

CHANGING = ServedWeights(
    ""
)  # while weights are changed, and if that breaks off: neither the old ones nor the new


class VLLMGenerator:
    """One engine. Set the engine's environment before the process starts. Safe to call from many threads.

    Two in one process may take turns but not work at once: vLLM keeps the current batch in a global.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        alive: Callable[[], None] = lambda: None,
        idle: Callable[[], None] = lambda: None,
    ):
        """alive, idle: called after progress, and when there is nothing to do (`Watchdog`)."""
        began = time.monotonic()
        from vllm import LLM

        if not spec.on_gpu:
            from dpo4rec_ray.knowledge import (
                cpu_top_p,  # imports torch, which actors without an engine do not need
            )

            cpu_top_p.install()
        self._spec = spec
        self._llm = LLM(**spec.arguments() | {"model": model_folder(spec.weights.model)})
        self._loop = EngineLoop(self._llm, alive, idle, time.monotonic() - began)
        self._serving = ServedWeights(spec.weights.model)
        self._lora: Any = None
        self._num_loras = 0
        self._refused = 0  # samples of prompts that never came to the engine
        self.use(*spec.weights)

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], num_samples: Sequence[int]
    ) -> list[Answer]:
        """Sample; returns when all prompts of this call are answered.

        A prompt that leaves no room for max_new_tokens, or that the engine refuses, gets a reason instead.

        Raises:
            EngineDied: the engine stopped under way; nothing of this call is kept.
        """
        return self._loop.submit(
            [
                self._request(prompt, seed, count)
                for prompt, seed, count in zip(prompts, seeds, num_samples, strict=True)
            ]
        )

    def use(self, model: str, lora: str | None = None) -> None:
        """From now on serve other weights of the same shape, without a new start: a whole model, or a base and a LoRA.

        A model's weights are read into the running engine; a LoRA is named with each request. Waits for running calls.

        Raises:
            UserError: the model's weights cannot be read; the engine then serves neither them nor those before.
        """
        wanted = ServedWeights(model, lora)
        if wanted == self._serving:
            return
        from vllm.lora.request import LoRARequest

        # What can fail for reasons outside the engine comes first: the old weights then stay.
        folder, adapter = model_folder(model), "" if lora is None else str(local_copy(lora))
        with self._loop.lock.alone():
            if wanted == self._serving:  # another thread was first
                return
            before, self._serving = self._serving, CHANGING
            if model != before.model:
                try:
                    self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
                except (
                    Exception
                ) as error:  # some weights may be of the other model now: the next call reads all anew
                    raise UserError(
                        f"{folder}: these weights could not be read: {first_line(error)}"
                    ) from error
                if not self._spec.on_gpu:
                    self._llm.apply_model(_pack_head)
            self._llm.reset_prefix_cache()
            self._lora = None
            if adapter:
                self._num_loras += 1  # vLLM keeps a LoRA by its number
                self._lora = LoRARequest(f"policy-{self._num_loras}", self._num_loras, adapter)
            self._serving = wanted

    def stats(self) -> EngineStats:
        return self._loop.stats()

    def finished(self) -> int:
        """Samples that were finished or refused since the start, those of unfinished calls among them."""
        return self._loop.finished() + self._refused

    def reset_stats(self) -> None:
        """Count from now on. Only while no call is under way."""
        self._loop.reset_stats()

    def _request(self, prompt: list[int], seed: int, count: int) -> Request | Answer:
        room = max_prompt_tokens(self._spec.llm, self._spec.generate)
        if len(prompt) > room:
            self._refused += count
            return Answer([], "prompt_too_long", f"{len(prompt)} tokens, room for {room}")
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        schema = self._spec.schema
        params = SamplingParams(
            n=count,
            seed=seed,
            **self._spec.sampling(),
            skip_special_tokens=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            structured_outputs=StructuredOutputsParams(json=schema) if schema else None,
        )
        return Request(prompt, params, self._lora)


def _pack_head(model: Any) -> None:
    """On CPU the output head works on a packed copy of its weights. vLLM does not renew it if the embedding is tied to it."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding):
            layer.quant_method.process_weights_after_loading(layer)
