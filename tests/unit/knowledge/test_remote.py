"""The client against a real HTTP server on this machine that fails on command, measures, and quotes the key it was given."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cloudpickle
import pyarrow as pa
import pytest

from dpo4rec_ray.config import default_config
from dpo4rec_ray.config.texts import GenerateSection, OpenAISection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.completions import Answer
from dpo4rec_ray.knowledge.remote import MAX_FAILED_IN_A_ROW, ApiKey, Endpoint
from dpo4rec_ray.knowledge.structured import factor_schema
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.texts.endpoint_texts import EndpointTexts

KEY = "key-that-nobody-may-see"
Body = dict[str, Any]
_PLAIN = GenerateSection()
Reply = tuple[int, Any, dict[str, str]]  # status, JSON (or text), headers


def completion(body: Body, **changes: Any) -> Reply:
    """A valid answer: every sample names its prompt, its seed and its place."""
    prompt = body["messages"][0]["content"]
    choices = [
        {
            "index": place,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": f"{prompt} {body['seed']} {place}"},
        }
        for place in range(body.get("n", 1))
    ]
    usage = {"prompt_tokens": 7, "completion_tokens": 5 * len(choices), "total_tokens": 7 + 5 * len(choices)}
    found = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices}
    return 200, found | {"usage": usage} | changes, {}


def error(status: int, message: str = "no", code: str | None = None, **headers: str) -> Reply:
    return status, {"error": {"message": message, "code": code, "param": None, "type": "x"}}, headers


class Server(ThreadingHTTPServer):
    """Answers each request with `answer(body, number)`; keeps what it got, when, and how many were under way at once."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Callable[[Body, int], Reply | None] = lambda body, number: completion(body)
        self.bodies: list[Body] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.active = self.most_active = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def endpoint(
        self,
        generate: GenerateSection = _PLAIN,
        key: str = KEY,
        schema: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Endpoint:
        given = OpenAISection(base_url=self.url, model="toy", api_key_env="TOY_KEY", **settings)
        return Endpoint(given, generate, ApiKey(key), schema)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
            server.times.append(time.monotonic())
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            reply = server.answer(body, number)
        finally:
            with server.lock:
                server.active -= 1
        if reply is None:  # hang up
            self.close_connection = True
            return
        status, content, headers = reply
        raw = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(raw)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    thread = threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def one(endpoint: Endpoint, prompt: str = "p", seed: int = 3, count: int = 1) -> Answer:
    (answer,) = endpoint.generate([prompt], [seed], [count])
    return answer


def texts(answer: Answer) -> list[str]:
    return [sample.text for sample in answer.samples]


def test_what_is_sent_and_what_comes_back(server: Server) -> None:
    section = GenerateSection(temperature=0.7, top_p=0.8, max_new_tokens=21)
    answer = one(server.endpoint(section, schema=factor_schema(["genre", "era"])), "hello", 3, 2)
    assert texts(answer) == ["hello 3 0", "hello 3 1"]
    assert [(sample.token_ids, sample.finish_reason) for sample in answer.samples] == [([], "stop")] * 2
    assert answer.usage == Counter(prompt_tokens=7, tokens=10, requests=1)
    (body,) = server.bodies
    form = body.pop("response_format")
    assert form["type"] == "json_schema" and form["json_schema"]["strict"]
    assert form["json_schema"]["schema"] == factor_schema(["genre", "era"])
    assert body == {
        "model": "toy",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0.7,
        "top_p": 0.8,
        "max_tokens": 21,
        "seed": 3,
        "n": 2,
    }
    assert server.keys == [f"Bearer {KEY}"]


def test_only_what_is_set_of_the_other_sampling_settings_is_sent(server: Server) -> None:
    """An endpoint that does not know a parameter may refuse the request."""
    one(server.endpoint(GenerateSection()))
    names = {"stop", "presence_penalty", "top_k", "min_p", "repetition_penalty"}
    assert not names & server.bodies.pop().keys()
    chosen = {"stop": ["\n"], "presence_penalty": 0.5, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.2}
    one(server.endpoint(GenerateSection(**chosen)))
    assert {name: server.bodies[-1][name] for name in names} == chosen


def test_a_chat_of_several_messages_is_sent_as_it_is(server: Server) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    server.endpoint(GenerateSection()).generate([chat], [3], [1])
    assert server.bodies[0]["messages"] == chat


def test_samples_in_requests_of_their_own(server: Server) -> None:
    """No `n` at all, a seed for each, the same ones again, and the order of samples is that of the seeds."""
    endpoint = server.endpoint(samples_per_request=1)
    answer = one(endpoint, seed=2**31 - 1, count=4)
    seeds = [int(text.split()[1]) for text in texts(answer)]
    assert len(set(seeds)) == 4 and seeds[0] == 2**31 - 1 and all(0 <= seed < 2**31 for seed in seeds)
    assert not any("n" in body for body in server.bodies)
    assert answer.usage == Counter(prompt_tokens=28, tokens=20, requests=4)
    assert texts(one(endpoint, seed=2**31 - 1, count=4)) == texts(answer)
    sizes = one(server.endpoint(samples_per_request=3), count=7)
    assert sorted(body.get("n", 1) for body in server.bodies[-3:]) == [1, 3, 3]
    assert len(sizes.samples) == 7


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_failures_are_tried_again(server: Server, status: int) -> None:
    server.answer = lambda body, number: (
        error(status, retry_after_ms="20") if number < 2 else completion(body)
    )
    answer = one(server.endpoint(max_retries=2))
    assert texts(answer) == ["p 3 0"]
    assert answer.usage == Counter(prompt_tokens=7, tokens=5, requests=3, retries=2)


def test_a_lost_connection_is_tried_again(server: Server) -> None:
    server.answer = lambda body, number: None if number == 0 else completion(body)
    answer = one(server.endpoint(max_retries=1))
    assert texts(answer) == ["p 3 0"] and answer.usage["retries"] == 1


def test_retry_after_is_waited_for(server: Server) -> None:
    """Longer than the client's own first wait, which is at most half a second."""
    server.answer = lambda body, number: error(429, Retry_After="1.2") if number == 0 else completion(body)
    one(server.endpoint(max_retries=1))
    assert server.times[1] - server.times[0] >= 1.2


def test_waits_grow_without_retry_after(server: Server) -> None:
    server.answer = lambda body, number: error(500)
    answer = one(server.endpoint(max_retries=2))
    first, second, third = server.times
    assert second - first > 0.35 and third - second > 0.7
    assert answer.reason == "endpoint_error" and "500" in answer.detail
    assert answer.usage == Counter(requests=3, retries=2)


def test_too_slow(server: Server) -> None:
    def slow(body: Body, number: int) -> Reply:
        time.sleep(1)
        return completion(body)

    server.answer = slow
    answer = one(server.endpoint(max_retries=0, timeout_s=0.2))
    assert answer.reason == "endpoint_error" and "openai.timeout_s = 0.2" in answer.detail


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("This model's maximum context length is 320 tokens. However, you requested 400", None),
        ("no", "context_length_exceeded"),
    ],
)
def test_a_prompt_that_is_too_long_is_named_and_the_others_are_written(
    server: Server, message: str, code: str | None
) -> None:
    def answer(body: Body, number: int) -> Reply:
        return error(400, message, code) if "long" in body["messages"][0]["content"] else completion(body)

    server.answer = answer
    found = server.endpoint().generate(["a", "long", "b"], [1, 2, 3], [1, 1, 1])
    assert [one.reason for one in found] == ["", "prompt_too_long", ""]
    assert [texts(one) for one in found] == [["a 1 0"], [], ["b 3 0"]]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (error(401, f"Incorrect API key provided: {KEY}"), ["TOY_KEY", "401"]),
        (error(403, f"{KEY} may not use toy"), ["TOY_KEY", "403", "'toy'"]),
        (
            error(404, f"The model toy does not exist for {KEY} or sk-abc123"),
            ["'toy'", "404", "openai.model"],
        ),
        (error(429, f"{KEY}: you exceeded your quota", "insufficient_quota"), ["TOY_KEY", "no credit"]),
    ],
)
def test_what_no_request_can_mend_ends_the_job(server: Server, reply: Reply, words: list[str]) -> None:
    """One line, without the key though the endpoint quotes it; later requests are not sent at all."""
    server.answer = lambda body, number: reply
    endpoint = server.endpoint(max_retries=0, max_concurrency=1)
    with pytest.raises(UserError) as raised:
        endpoint.generate(["p"] * 30, [1] * 30, [1] * 30)
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert KEY not in message and "sk-abc123" not in message and "\n" not in message
    assert len(server.bodies) == 1
    with pytest.raises(UserError):
        one(endpoint)
    assert len(server.bodies) == 1


def test_an_endpoint_that_only_fails_ends_the_job(server: Server) -> None:
    server.answer = lambda body, number: error(500, f"out of order, {KEY}")
    endpoint = server.endpoint(max_retries=0, max_concurrency=1)
    with pytest.raises(
        UserError, match=f"{MAX_FAILED_IN_A_ROW} requests in a row failed.*out of order"
    ) as raised:
        endpoint.generate(["p"] * 50, [1] * 50, [1] * 50)
    assert KEY not in str(raised.value)
    assert len(server.bodies) == MAX_FAILED_IN_A_ROW


def test_failures_now_and_then_end_nothing(server: Server) -> None:
    server.answer = lambda body, number: completion(body) if number % 10 == 0 else error(500, KEY)
    found = server.endpoint(max_retries=0, max_concurrency=1).generate(["p"] * 50, [1] * 50, [1] * 50)
    assert Counter(one.reason for one in found) == {"": 5, "endpoint_error": 45}
    assert not any(KEY in one.detail for one in found)


def test_nobody_listens() -> None:
    section = OpenAISection(base_url="http://127.0.0.1:9/v1", model="toy", max_retries=0)
    endpoint = Endpoint(section, _PLAIN, ApiKey(""))
    answer = one(endpoint)
    assert answer.reason == "endpoint_error" and "no connection" in answer.detail


def test_concurrency_is_bounded_over_all_callers(server: Server) -> None:
    """Four requests at a time, never more and not less, though three callers ask for twenty prompts each."""

    def slow(body: Body, number: int) -> Reply:
        time.sleep(0.05)
        return completion(body)

    server.answer = slow
    endpoint = server.endpoint(max_concurrency=4)

    def call(caller: int) -> list[list[str]]:
        prompts = [f"{caller}-{number}" for number in range(20)]
        return [texts(one) for one in endpoint.generate(prompts, [1] * 20, [1] * 20)]

    with ThreadPoolExecutor(3) as callers:
        found = list(callers.map(call, range(3)))
    assert found == [[[f"{caller}-{number} 1 0"] for number in range(20)] for caller in range(3)]
    assert server.most_active == 4


def test_the_other_name_of_the_length_limit(server: Server) -> None:
    """Asked for once, then remembered."""

    def answer(body: Body, number: int) -> Reply:
        if "max_tokens" in body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return completion(body)

    server.answer = answer
    endpoint = server.endpoint(GenerateSection(max_new_tokens=11))
    first, second = one(endpoint), one(endpoint)
    assert first.usage["requests"] == 2 and second.usage["requests"] == 1
    assert server.bodies[-1]["max_completion_tokens"] == 11 and len(server.bodies) == 3


def test_without_a_key_none_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that lies in the environment for somebody else."""
    monkeypatch.setenv("OPENAI_API_KEY", "for another endpoint")
    assert texts(one(server.endpoint(key=""))) == ["p 3 0"]
    assert server.keys == [None]
    server.answer = lambda body, number: error(401)
    with pytest.raises(UserError, match=r"wants a key.*TOY_KEY"):
        one(server.endpoint(key=""))


@pytest.mark.parametrize("content", ["<html>welcome</html>", {"hello": "world"}, {"choices": []}, []])
def test_an_answer_of_another_kind(server: Server, content: Any) -> None:
    server.answer = lambda body, number: (200, content, {})
    answer = one(server.endpoint(max_retries=0))
    assert answer.reason == "endpoint_error" and "no chat completion" in answer.detail


def test_an_endpoint_that_does_not_know_n(server: Server) -> None:
    server.answer = lambda body, number: completion({**body, "n": 1})
    answer = one(server.endpoint(), count=3)
    assert len(answer.samples) == 1 and "openai.samples_per_request" in answer.detail


def test_a_refusal_is_an_empty_text(server: Server) -> None:
    message = {"role": "assistant", "content": None, "refusal": "I will not"}
    choice = {"index": 0, "finish_reason": "content_filter", "message": message}
    server.answer = lambda body, number: completion(body, choices=[choice], usage=None)
    (sample,) = one(server.endpoint()).samples
    assert (sample.text, sample.finish_reason) == ("", "content_filter")


def test_a_key_does_not_show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is among the arguments of an actor."""
    monkeypatch.setenv("TOY_KEY", KEY)
    placement = EndpointTexts.placement(default_config(["openai.api_key_env=TOY_KEY"]), RunDir(tmp_path), 0)
    key = placement.arguments["key"]
    assert KEY not in repr(placement) and KEY not in str(key) and KEY not in f"{key}"
    assert cloudpickle.loads(cloudpickle.dumps(placement)).arguments["key"].reveal() == KEY


@pytest.mark.parametrize("content", ["\ud83d broken", ["a", "list"], 7, {"text": "x"}])
def test_odd_content_can_be_stored(server: Server, content: Any) -> None:
    def answer(body: Body, number: int) -> Reply:
        status, found, headers = completion(body)
        found["choices"][0]["message"]["content"] = content
        return status, json.dumps(found), {**headers, "Content_Type": "application/json"}

    server.answer = answer
    found = one(server.endpoint(max_retries=0))
    for sample in found.samples:
        sample.text.encode("utf-8")
        assert sample.text in ("? broken", "")


def test_a_terminal_gets_no_commands(server: Server) -> None:
    server.answer = lambda body, number: error(400, "no \x1b[2Jway")
    assert "\x1b" not in one(server.endpoint(max_retries=0)).detail


def test_a_prompt_that_is_too_long_loses_its_oldest_events(server: Server, tmp_path: Path) -> None:
    """The endpoint takes five titles and no more; a user whose profile alone is too long is named."""
    store = RunDir(tmp_path)
    store.start("items")
    columns = {
        "item_id": range(40),
        "raw_id": map(str, range(40)),
        "title": (f"Film {i:02d}" for i in range(40)),
    }
    items = pa.table(
        {**{name: list(values) for name, values in columns.items()}, "attributes": [["genre: x"]] * 40}
    )
    store.write("items", items)
    store.finish(Manifest("items", "", 40))

    def answer(body: Body, number: int) -> Reply:
        prompt = body["messages"][0]["content"]
        if prompt.count("Film") > 5 or "endless" in prompt:
            return error(400, "maximum context length is 5 films", "context_length_exceeded")
        return completion(body)

    server.answer = answer
    recipe = ["prompt.factors=short", f"openai.base_url={server.url}", "openai.model=toy"]
    writer = EndpointTexts(default_config(recipe), store, key=ApiKey(KEY))
    rows = [
        {"user_id": n, "profile": profile, "history_item_ids": list(range(n)), "history_ratings": [4.0] * n}
        for profile, n in (("", 3), ("", 20), ("endless", 4))
    ]
    short, long, endless = writer.users(rows, [1, 2, 3], [2, 2, 2])
    assert (len(short.samples), short.num_left_out) == (2, 0)
    assert (len(long.samples), long.num_left_out) == (2, 15), "20 -> 10 -> 5 events"
    assert all("Film 19" in sample.text and "Film 14" not in sample.text for sample in long.samples)
    assert long.usage["requests"] == 3, "what was refused is counted too"
    assert (endless.samples, endless.reason) == ([], "prompt_too_long")
