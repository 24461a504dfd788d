"""Prompt token ids in, N completions with their token ids out: one vLLM engine in this process, on CPU and GPU.

Callers overlap: `generate` may be called from several threads, each for the users of one shard. One more thread steps
the engine, so that one shard's first requests fill what another's last ones leave free; the engine never waits for a
batch to end, nor for what is read and written between batches. (vLLM's AsyncLLM does the same but needs a process of
its own, which on CPU makes the start four times as long.)
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM

# Measured on vLLM's CPU engine (benchmarks/bench.py generate): compilation costs a minute and gains nothing; without chunked
# prefill a request's own seed holds; small blocks let a user's N samples share all but a few tokens of one prefill.
CPU_ENGINE = {"enforce_eager": True, "enable_chunked_prefill": False, "block_size": 32}
# What a recipe's engine_args cannot set: it has a key of its own, or would let a model folder run code.
OWN_ARGUMENTS = {
    "model": "llm.path",
    "dtype": "llm.dtype",
    "max_model_len": "llm.max_model_len",
    "tensor_parallel_size": "generate.tensor_parallel_size",
    "pipeline_parallel_size": "generate.pipeline_parallel_size",
    "max_num_seqs": "generate.max_num_seqs",
    "gpu_memory_utilization": "generate.gpu_memory_utilization",
    "enable_lora": "llm.lora_mode",
    "max_lora_rank": "dpo.lora_rank",
    "disable_log_stats": "nothing: the run's figures need it",
    "trust_remote_code": "nothing: it is off",
}
LOAD_FORMATS = ("safetensors", "dummy")  # others can run code
_STATS_EVERY_S = 1.0


@dataclass(frozen=True)
class Completion:
    """One sample. `token_ids` are what the engine produced, EOS included; they are what DPO trains on."""

    token_ids: list[int]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Answer:
    """What an engine gives back for one prompt: its samples, or why there are none."""

    samples: list[Completion]
    reason: str = ""  # prompt_too_long, engine_error
    detail: str = ""


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn. schema: a JSON schema that the engine holds every sample to; None: free text."""

    temperature: float = 0.9
    top_p: float = 0.95
    max_new_tokens: int = 256
    schema: dict[str, Any] | None = None


@dataclass(frozen=True)
class EngineSettings:
    """What the engine loads and how much it may take. extra: further arguments of vLLM's EngineArgs."""

    model: str
    adapter: str | None = None
    lora: bool = False  # made for LoRA, even while it serves the base model
    dtype: str = "float32"
    max_model_len: int = 1024
    on_gpu: bool = False
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_num_seqs: int = 256
    max_lora_rank: int = 16
    extra: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """As vLLM takes them."""
        chosen: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "load_format": "safetensors",
            "disable_log_stats": False,
            "enable_prefix_caching": True,
            "max_num_seqs": self.max_num_seqs,
            # JSON without spaces: small LLMs spend their tokens on line breaks where they may. Only the engine can be
            # told; in a request's own parameters xgrammar does not look for it.
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        }
        if self.on_gpu:
            chosen["gpu_memory_utilization"] = self.gpu_memory_utilization
        else:
            chosen |= {**CPU_ENGINE, "max_num_batched_tokens": max(4096, self.max_model_len)}
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) > 1:
                chosen[name] = getattr(self, name)
        if self.lora or self.adapter:
            chosen |= {"enable_lora": True, "max_lora_rank": self.max_lora_rank}
        return chosen | self.extra


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done since it was ready.

    Attributes:
        tokens: generated, of finished samples.
        busy: share of the time since the first request in which there was work.
        running: samples worked on at once, mean over that time.
        kv_cache: share of the KV cache in use, mean over that time.
        prefix_hits: share of the prompt tokens that were not computed again, since the start.
        start_s: from the constructor's beginning to ready.
        span_s: from the first request to the last answer.
    """

    samples: int = 0
    tokens: int = 0
    busy: float = 0.0
    running: float = 0.0
    kv_cache: float = 0.0
    prefix_hits: float = 0.0
    start_s: float = 0.0
    span_s: float = 0.0


class EngineDied(RuntimeError):
    """The engine can make no further token; its process has to be replaced."""


class VLLMGenerator:
    """One engine. Set the engine's environment before the process starts. Safe to call from many threads.

    Two in one process may take turns, not work at once: vLLM keeps the batch in hand in a global.
    """

    def __init__(
        self,
        engine: EngineSettings,
        sampling: Sampling,
        *,
        alive: Callable[[], None] = lambda: None,
        idle: Callable[[], None] = lambda: None,
    ):
        """alive, idle: told about progress, and when there is nothing to do (`Watchdog`)."""
        began = time.monotonic()
        from vllm import LLM

        llm = LLM(**engine.arguments())
        self._engine, self._sampling = engine, sampling
        self._max_prompt = engine.max_model_len - sampling.max_new_tokens
        self._lora: Any = None
        self._num_adapters = 0
        self._serving = (engine.model, None)
        self._loop = _Loop(llm, alive, idle, time.monotonic() - began)
        self._llm = llm
        self.use(engine.model, engine.adapter)

    @property
    def max_prompt(self) -> int:
        """Tokens that a prompt may have."""
        return self._max_prompt

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
                self._job(prompt, seed, count)
                for prompt, seed, count in zip(prompts, seeds, num_samples, strict=True)
            ]
        )

    def use(self, model: str, adapter: str | None = None) -> None:
        """Serve other weights of the same shape from now on, without a new start: a merged folder, or base and LoRA.

        Weights are read into the running engine; a LoRA is named to it with each request. Waits for running calls.
        """
        if (model, adapter) == self._serving:
            return
        from vllm.lora.request import LoRARequest

        with self._loop.gate.alone():
            if (model, adapter) == self._serving:  # another thread was first
                return
            if model != self._serving[0]:
                self._llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
                if not self._engine.on_gpu:
                    self._llm.apply_model(_pack_head)
            self._llm.reset_prefix_cache()
            self._lora = None
            if adapter is not None:
                self._num_adapters += 1  # vLLM keeps a LoRA by its number
                self._lora = LoRARequest(f"policy-{self._num_adapters}", self._num_adapters, adapter)
            self._serving = (model, adapter)

    def stats(self) -> EngineStats:
        return self._loop.stats()

    def count_anew(self) -> None:
        """Figures from now on; while nothing is under way."""
        self._loop.count_anew()

    def _job(self, prompt: list[int], seed: int, count: int) -> _Job | Answer:
        if len(prompt) > self._max_prompt:
            detail = f"{len(prompt)} tokens, room for {self._max_prompt}"
            return Answer([], "prompt_too_long", detail)
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        schema = self._sampling.schema
        params = SamplingParams(
            n=count,
            seed=seed,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            max_tokens=self._sampling.max_new_tokens,
            skip_special_tokens=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
            structured_outputs=StructuredOutputsParams(json=schema) if schema else None,
        )
        return _Job(prompt, params, self._lora)


def _pack_head(model: Any) -> None:
    """On CPU the head multiplies by a packed copy of its weights; vLLM forgets it where the embedding is tied to it."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding):
            layer.quant_method.process_weights_after_loading(layer)


@dataclass(frozen=True)
class _Job:
    prompt: list[int]
    params: Any
    lora: Any


class _Call:
    """One call of `submit`: its answers as they come in."""

    def __init__(self, size: int):
        self.answers: list[Answer | None] = [None] * size
        self.missing = size
        self.done = threading.Event()

    def put(self, index: int, answer: Answer) -> None:
        self.answers[index] = answer
        self.missing -= 1
        if not self.missing:
            self.done.set()


class Gate:
    """Any number of calls at once, or one that is alone."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._owner: int | None = None

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        if self._owner == threading.get_ident():  # a call inside `alone`
            yield
            return
        with self._condition:
            self._condition.wait_for(lambda: self._owner is None)
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: self._owner is None)
            self._owner = threading.get_ident()
            self._condition.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._condition:
                self._owner = None
                self._condition.notify_all()


class _Loop:
    """The thread that steps the engine, and the books it keeps."""

    def __init__(self, llm: LLM, alive: Callable[[], None], idle: Callable[[], None], start_s: float):
        self.gate = Gate()
        self._engine = llm.llm_engine
        # The scheduler's gauges are wanted, made once per step; statistics of every token of every request are not: they
        # take 3 to 5 % of a small model's time.
        self._engine.log_stats = False
        self._alive, self._idle, self._start_s = alive, idle, start_s
        self._inbox: queue.SimpleQueue[tuple[_Call, int, _Job]] = queue.SimpleQueue()
        self._open: dict[str, tuple[_Call, int]] = {}
        self._died: BaseException | None = None
        self._number, self._prefix_hits = 0, 0.0
        self.count_anew()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def count_anew(self) -> None:
        self._samples = self._tokens = 0
        self._first = self._last = self._worked = 0.0
        self._read_at = 0.0
        self._weight = self._running = self._kv = 0.0

    def submit(self, jobs: Sequence[_Job | Answer]) -> list[Answer]:
        call = _Call(len(jobs))
        with self.gate.shared():
            for index, job in enumerate(jobs):  # before the engine's thread may put any
                if isinstance(job, Answer):
                    call.put(index, job)
            for index, job in enumerate(jobs):
                if not isinstance(job, Answer):
                    self._inbox.put((call, index, job))
            while call.missing and not call.done.wait(1.0):
                self._raise_if_died()  # also where the loop ended before it saw this call
        self._raise_if_died()
        return [answer for answer in call.answers if answer is not None]

    def stats(self) -> EngineStats:
        span = max(self._last - self._first, 1e-9)
        share = 1 / max(self._weight, 1e-9)
        return EngineStats(
            samples=self._samples,
            tokens=self._tokens,
            busy=min(1.0, self._worked / span),
            running=self._running * share,
            kv_cache=self._kv * share,
            prefix_hits=self._prefix_hits,
            start_s=self._start_s,
            span_s=span,
        )

    def _raise_if_died(self) -> None:
        if self._died is not None:
            raise EngineDied(f"{type(self._died).__name__}: {self._died}") from self._died

    def _run(self) -> None:
        import torch

        # After torch.set_num_threads elsewhere, a new thread would follow only later, and vLLM's CPU kernels end the
        # engine when the number changes between two of them.
        torch.set_num_threads(torch.get_num_threads())
        try:
            while True:
                self._admit()
                if (
                    not self._open
                ):  # all were refused: an engine in a process of its own would be waited for in vain
                    continue
                began = time.monotonic()
                outputs = self._engine.step()
                self._last = time.monotonic()
                self._worked += self._last - began
                for output in outputs:
                    if output.finished:
                        self._deliver(output)
                if self._last - self._read_at > _STATS_EVERY_S:
                    self._read_stats()
        except BaseException as error:  # whatever ends this thread ends the engine: say so to every caller
            self._died = error
            for call, _ in self._open.values():
                call.done.set()

    def _admit(self) -> None:
        """Take in what is waiting; without any work, wait for some."""
        if not self._open and self._inbox.empty():
            self._idle()
            self._take(self._inbox.get())
            self._alive()
            if not self._first:
                self._first = self._read_at = time.monotonic()
        while not self._inbox.empty():
            self._take(self._inbox.get())

    def _take(self, entry: tuple[_Call, int, _Job]) -> None:
        call, index, job = entry
        self._number += 1
        name = str(self._number)
        began = time.monotonic()
        try:
            self._engine.add_request(
                name, {"prompt_token_ids": job.prompt}, job.params, lora_request=job.lora
            )
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                raise
            # whatever else it is, this request is refused and the engine goes on
            call.put(index, Answer([], "engine_error", f"{type(error).__name__}: {error}"))
            return
        self._worked += time.monotonic() - began
        self._open[name] = (call, index)

    def _deliver(self, output: Any) -> None:
        call, index = self._open.pop(output.request_id)
        samples = [
            Completion(list(sample.token_ids), sample.text, str(sample.finish_reason))
            for sample in sorted(output.outputs, key=lambda sample: sample.index)
        ]
        if any(sample.finish_reason == "error" for sample in samples):
            call.put(index, Answer([], "engine_error", "the engine gave up this request; its log says why"))
            return
        self._samples += len(samples)
        self._tokens += sum(len(sample.token_ids) for sample in samples)
        self._alive()
        call.put(index, Answer(samples))

    def _read_stats(self) -> None:
        """vLLM's own gauges. Requests that run get a token each with every step: a sign of life."""
        from vllm.v1.metrics.reader import get_metrics_snapshot

        found = {metric.name.removeprefix("vllm:"): metric for metric in get_metrics_snapshot()}

        def value(name: str) -> float:
            return float(getattr(found.get(name), "value", 0.0))

        running = value("num_requests_running")
        if running:
            self._alive()
        span, self._read_at = self._last - self._read_at, self._last
        self._weight += span
        self._running += span * running
        self._kv += span * value("kv_cache_usage_perc")
        self._prefix_hits = value("prefix_cache_hits") / max(value("prefix_cache_queries"), 1.0)
