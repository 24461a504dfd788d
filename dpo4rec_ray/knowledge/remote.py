"""Prompts in, N completions out: any OpenAI-compatible chat endpoint, with bounded concurrency and with retries.

`generate` may be called from several threads. Their requests share one pool of threads, so that the next shard's requests
are under way while the last ones of this shard are waited for. The client itself repeats requests that fail for a while
(429, 5xx, lost connections, timeouts); it waits longer each time, or as long as Retry-After says.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from dpo4rec_ray.config.texts import GenerateSection, OpenAISection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.completions import Answer, Completion
from dpo4rec_ray.knowledge.prompts import Message

if TYPE_CHECKING:
    from openai import APIError

# Requests, each after its retries. If so many fail, the reason is the endpoint and not a prompt.
MAX_FAILED_IN_A_ROW = 20
_TOO_LONG = re.compile(r"context.?(length|window)|too long|too many tokens", re.IGNORECASE)
_SEED_STEP = 0x9E3779B1  # odd, so that the seeds of a user's requests differ
_MAX_DETAIL = 200  # characters of an endpoint's message that are kept


class ApiKey:
    """A key that does not appear in what is printed, logged or raised. Empty: no key is sent."""

    def __init__(self, value: str):
        self._value = value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "ApiKey(***)"

    def reveal(self) -> str:
        return self._value

    def hide_in(self, text: str) -> str:
        """`text` without the key and without what looks like a key: endpoints quote parts of it."""
        text = text.replace(self._value, "***") if self._value else text
        return re.sub(r"\bsk-\S+|(?<=Bearer )\S+", "***", text)


class Endpoint:
    """A client of one endpoint. Safe to call from many threads."""

    def __init__(
        self,
        openai: OpenAISection,
        generate: GenerateSection,
        key: ApiKey,
        schema: dict[str, Any] | None = None,
    ):
        """key: what the environment variable openai.api_key_env holds; schema: JSON schema of every sample, or None."""
        from openai import Omit, OpenAI

        self.openai, self.generation, self._key, self._schema = openai, generate, key, schema
        self._client = OpenAI(
            # Without a key the client would send OPENAI_API_KEY, wherever the request goes.
            api_key=key.reveal() or "none",
            base_url=openai.base_url,
            timeout=openai.timeout_s,
            max_retries=openai.max_retries,
        )
        self._headers = None if key else {"Authorization": Omit()}
        self._pool = ThreadPoolExecutor(requests_at_once(openai, generate), thread_name_prefix="endpoint")
        self._length_name = "max_tokens"
        self._lock = threading.Lock()
        self._failed_in_a_row = 0
        self._finished = 0
        self._fatal: UserError | None = None

    def generate(
        self, prompts: Sequence[str | list[Message]], seeds: Sequence[int], num_samples: Sequence[int]
    ) -> list[Answer]:
        """`num_samples` completions per prompt, each prompt one user message or the messages of a chat.

        Raises:
            UserError: the key, the model or the endpoint is wrong, or requests fail whatever is in them.
        """
        todo = [
            [
                self._pool.submit(self._counted_request, prompt, part_seed, size)
                for part_seed, size in self._parts(seed, n)
            ]
            for prompt, seed, n in zip(prompts, seeds, num_samples, strict=True)
        ]
        return [_joined([part.result() for part in parts]) for parts in todo]

    def finished(self) -> int:
        """Samples that were asked for and answered, or given up, those of unfinished calls among them."""
        return self._finished

    def _parts(self, seed: int, count: int) -> list[tuple[int, int]]:
        """(seed, samples) of each request for one prompt."""
        size = self.openai.samples_per_request or count
        return [
            ((seed + _SEED_STEP * number) & 0x7FFFFFFF, min(size, count - low))
            for number, low in enumerate(range(0, count, size))
        ]

    def _counted_request(self, prompt: str | list[Message], seed: int, count: int) -> Answer:
        answer = self._request(prompt, seed, count)
        with self._lock:
            self._finished += count
        return answer

    def _request(self, prompt: str | list[Message], seed: int, count: int) -> Answer:
        from openai import APIError

        if self._fatal is not None:
            raise self._fatal
        usage: Counter[str] = Counter()
        try:
            completion = self._create(prompt, seed, count, usage)
        except APIError as error:
            _count_requests(usage, error.request.headers.get("x-stainless-retry-count"))
            reason, detail = self._reason(error)
            self._note(failed=detail if reason == "endpoint_error" else "")
            return Answer([], reason, detail, usage=usage)
        found = getattr(completion, "choices", None)
        if not found:  # something else than an OpenAI endpoint may answer anything
            self._note(failed="the answer is no chat completion")
            return Answer([], "endpoint_error", "the answer is no chat completion", usage=usage)
        self._note(failed="")
        if completion.usage is not None:
            usage["prompt_tokens"] += completion.usage.prompt_tokens or 0
            usage["tokens"] += completion.usage.completion_tokens or 0
        samples = [
            Completion([], _plain(getattr(getattr(choice, "message", None), "content", "")), _plain(reason))
            for choice in found[:count]
            for reason in [str(getattr(choice, "finish_reason", ""))]
        ]
        if len(samples) < count:
            detail = f"{len(samples)} of {count} samples; does the endpoint know `n`? see openai.samples_per_request"
            return Answer(samples, detail=detail, usage=usage)
        return Answer(samples, usage=usage)

    def _create(self, prompt: str | list[Message], seed: int, count: int, usage: Counter[str]) -> Any:
        """One request, sent again under the other name of the length limit where the endpoint asks for that."""
        from openai import BadRequestError

        section = self.generation
        arguments: dict[str, Any] = {
            "model": self.openai.model,
            "messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
            "temperature": section.temperature,
            "top_p": section.top_p,
            "seed": seed,
            "extra_headers": self._headers,
        }
        if section.stop:
            arguments["stop"] = list(section.stop)
        if section.presence_penalty:
            arguments["presence_penalty"] = section.presence_penalty
        if more := _beyond_openai(section):
            arguments["extra_body"] = more
        if count > 1:
            arguments["n"] = count
        if self._schema is not None:
            form = {"name": "factors", "strict": True, "schema": self._schema}
            arguments["response_format"] = {"type": "json_schema", "json_schema": form}
        create = self._client.chat.completions.with_raw_response.create
        name = self._length_name
        try:
            raw = create(**arguments, **{name: section.max_new_tokens})
        except BadRequestError as error:
            if name != "max_tokens" or "max_completion_tokens" not in error.message:
                raise
            _count_requests(usage, error.request.headers.get("x-stainless-retry-count"))
            self._length_name = "max_completion_tokens"
            raw = create(**arguments, max_completion_tokens=section.max_new_tokens)
        _count_requests(usage, raw.retries_taken)
        try:
            return raw.parse()
        except ValueError:  # its header says JSON, but it is not
            return None

    def _reason(self, error: APIError) -> tuple[str, str]:
        """(reason, detail) of a request that failed for good.

        Raises:
            UserError: no other request can do better.
        """
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        section = self.openai
        model, key_name = f"openai.model = {section.model!r}", section.api_key_env
        if isinstance(error, APITimeoutError):
            return "endpoint_error", f"no answer within openai.timeout_s = {section.timeout_s:g}"
        if isinstance(error, APIConnectionError):
            return "endpoint_error", f"no connection ({self._short(str(error.__cause__ or error))})"
        if not isinstance(error, APIStatusError):
            return "endpoint_error", self._short(error.message)
        status, words = error.status_code, self._short(error.message)
        where = f"endpoint {section.base_url}"
        if status == 401 and self._key:
            raise self._ends(f"{where} refuses the key in {key_name} (401); set it to a valid one")
        if status == 401:
            raise self._ends(f"{where} wants a key (401); set the environment variable {key_name}")
        if status == 403:
            raise self._ends(f"{where} does not let the key in {key_name} use {model} ({words})")
        if status == 404:
            raise self._ends(f"{where} has no {model} ({words}); correct openai.model or openai.base_url")
        if error.code == "insufficient_quota":
            raise self._ends(f"{where}: the account of the key in {key_name} has no credit left ({words})")
        too_long = error.code == "context_length_exceeded" or _TOO_LONG.search(error.message)
        if status in (400, 413, 422) and too_long:
            return "prompt_too_long", words
        return "endpoint_error", words

    def _note(self, failed: str) -> None:
        """Count failures in a row. failed: what went wrong, in words; empty if the request was answered.

        Raises:
            UserError: too many of them.
        """
        with self._lock:
            self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
            count = self._failed_in_a_row
        if count >= MAX_FAILED_IN_A_ROW:
            raise self._ends(
                f"endpoint {self.openai.base_url}: {count} requests in a row failed, the last: {failed}; "
                "repair the endpoint, then run again: finished shards are kept"
            )

    def _ends(self, words: str) -> UserError:
        """The error that this request and all later ones raise."""
        self._fatal = UserError(words)
        return self._fatal

    def _short(self, text: str) -> str:
        """An endpoint's message on one line, without the key."""
        return self._key.hide_in(" ".join(_plain(text).split()))[:_MAX_DETAIL]


def requests_at_once(openai: OpenAISection, generate: GenerateSection) -> int:
    """Requests at the same time of one worker: its share of openai.max_concurrency."""
    return max(1, openai.max_concurrency // generate.num_engines)


def _beyond_openai(section: GenerateSection) -> dict[str, Any]:
    """What is set of the parameters that OpenAI has not, but vLLM, SGLang and others: an endpoint may refuse or ignore them."""
    plain = GenerateSection()
    names = ("top_k", "min_p", "repetition_penalty")
    return {name: getattr(section, name) for name in names if getattr(section, name) != getattr(plain, name)}


def _plain(value: object) -> str:
    """An endpoint's text so that it can be stored and shown: "" if it is no text, spaces for control characters."""
    if not isinstance(value, str):
        return ""
    text = value.encode("utf-8", "replace").decode("utf-8")
    return "".join(char if char in "\n\t" or unicodedata.category(char) != "Cc" else " " for char in text)


def _count_requests(usage: Counter[str], retries: int | str | None) -> None:
    retries = int(retries or 0)
    usage.update(requests=retries + 1, retries=retries)


def _joined(parts: Sequence[Answer]) -> Answer:
    """One answer of all requests for a prompt. If a request failed there are no samples, but the usage of all is counted."""
    usage = sum((Counter(part.usage) for part in parts), Counter[str]())
    failed = next((part for part in parts if part.reason), None)
    if failed is not None:
        return Answer([], failed.reason, failed.detail, usage=usage)
    samples = [sample for part in parts for sample in part.samples]
    return Answer(samples, "", next((part.detail for part in parts if part.detail), ""), usage=usage)
