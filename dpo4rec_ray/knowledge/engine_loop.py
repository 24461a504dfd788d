"""The thread that steps a vLLM engine: requests of many callers in, their answers out, and what the engine has done.

While one shard ends, the next shard's requests use the room that gets free. The engine waits neither for the end of a batch
nor for what is read and written between batches.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpo4rec_ray.knowledge.completions import Answer, Completion
from dpo4rec_ray.knowledge.shared_lock import SharedLock

if TYPE_CHECKING:
    from vllm import LLM

_STATS_EVERY_S = 1.0


class EngineDied(RuntimeError):
    """The engine can make no further token; its process has to be replaced."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done since it was ready.

    Attributes:
        tokens: generated, of finished samples.
        busy: share of the time since the first request in which there was work.
        running: mean number of samples at the same time, since the first request.
        kv_cache: mean share of the KV cache in use, since the first request.
        prefix_hits: share of the prompt tokens that were found in the cache, since the start.
        start_s: seconds from the constructor's beginning to ready.
        span_s: seconds from the first request to the last answer.
    """

    samples: int = 0
    tokens: int = 0
    busy: float = 0.0
    running: float = 0.0
    kv_cache: float = 0.0
    prefix_hits: float = 0.0
    start_s: float = 0.0
    span_s: float = 0.0


@dataclass(frozen=True)
class Request:
    """One prompt for the engine, with vLLM's SamplingParams and LoRARequest (or None)."""

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


class EngineLoop:
    """Owns the thread. `lock` is shared by running calls; whoever holds it alone may change the engine."""

    def __init__(self, llm: LLM, alive: Callable[[], None], idle: Callable[[], None], start_s: float):
        """alive, idle: called after progress, and when there is nothing to do; start_s: how long the start took."""
        self.lock = SharedLock()
        self._engine = llm.llm_engine
        # The scheduler's gauges, made once per step, are kept. The statistics of each token are off: they take 3 to 5 % of
        # a small model's time.
        self._engine.log_stats = False
        self._alive, self._idle, self._start_s = alive, idle, start_s
        self._inbox: queue.SimpleQueue[tuple[_Call, int, Request]] = queue.SimpleQueue()
        self._open: dict[str, tuple[_Call, int]] = {}
        self._died: BaseException | None = None
        self._number, self._prefix_hits = 0, 0.0
        self._admitted = 0  # samples, since the start
        self.reset_stats()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def reset_stats(self) -> None:
        """Count from now on. Only while no request is under way."""
        self._samples = self._tokens = 0
        self._first = self._last = self._worked = 0.0
        self._read_at = 0.0
        self._weight = self._running = self._kv = 0.0

    def submit(self, requests: Sequence[Request | Answer]) -> list[Answer]:
        """Answers in the order of the requests, when all are there. An `Answer` among the requests is passed on.

        Raises:
            EngineDied: the engine stopped under way.
        """
        call = _Call(len(requests))
        with self.lock.shared():
            for index, request in enumerate(requests):  # before the engine's thread may put any
                if isinstance(request, Answer):
                    call.put(index, request)
            for index, request in enumerate(requests):
                if not isinstance(request, Answer):
                    self._inbox.put((call, index, request))
            while call.missing and not call.done.wait(1.0):
                self._raise_if_died()  # also where the loop ended before it saw this call
        self._raise_if_died()
        return [answer for answer in call.answers if answer is not None]

    def finished(self) -> int:
        """Samples that were finished or refused since the start, those of unfinished calls among them."""
        return self._admitted - self._engine.get_num_unfinished_requests()

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

        # If another thread called torch.set_num_threads, this thread would follow only later, and vLLM's CPU kernels end
        # the engine if the number changes between two of them.
        torch.set_num_threads(torch.get_num_threads())
        try:
            while True:
                self._admit()
                # If all requests were refused, step() would wait for ever where the engine has a process of its own.
                if not self._open:
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
        except BaseException as error:  # whatever ends this thread ends the engine: every caller must know
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

    def _take(self, entry: tuple[_Call, int, Request]) -> None:
        call, index, request = entry
        self._number += 1
        name = str(self._number)
        began = time.monotonic()
        try:
            self._engine.add_request(
                name, {"prompt_token_ids": request.prompt}, request.params, lora_request=request.lora
            )
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                raise
            # After any other error only this request is refused, and the engine goes on.
            self._admitted += request.params.n
            call.put(index, Answer([], "engine_error", f"{type(error).__name__}: {error}"))
            return
        self._admitted += request.params.n
        self._worked += time.monotonic() - began
        self._open[name] = (call, index)

    def _deliver(self, output: Any) -> None:
        call, index = self._open.pop(output.request_id)
        samples = [
            Completion(list(sample.token_ids), sample.text, str(sample.finish_reason), token_logps(sample))
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
        """vLLM's own gauges. Running requests get a token each with every step, which is a sign of life."""
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


def token_logps(sample: Any) -> list[float] | None:
    """Of each token of a vLLM completion, where they were asked for."""
    if sample.logprobs is None:
        return None
    return [entries[token].logprob for token, entries in zip(sample.token_ids, sample.logprobs, strict=True)]
