"""The client against the real application, and against servers that close the connection, stall or refuse."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving.api import Candidate, Event, Meta, RerankRequest, RerankResponse
from dpo4rec_ray.serving.client import Client, Refused, Unavailable
from dpo4rec_ray.serving.http import build_api
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.service import Service
from dpo4rec_ray.store.artifacts import RunDir
from tests.serving_world import Api, listening, requests_of

HANG_UP = b""


def answer(content: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-length: {len(content)}\r\n\r\n{content}".encode()


OK = answer("[]")


def refusal(status: int, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} No", "content-length: 16", *headers, "", '{"detail": "no"}']
    return "\r\n".join(lines).encode()


@contextmanager
def peer(*answers: bytes, close: bool = True) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives these answers. close: one answer per connection. Yields its address and the requests it got."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            left = list(answers)
            while left:
                with server.accept()[0] as connection:
                    while left and (request := one_request(connection)):
                        seen.append(request)
                        answer = left.pop(0)
                        connection.sendall(answer.replace(b"No\r\n", b"No\r\nconnection: close\r\n"))
                        if close or answer == HANG_UP:
                            break

        def ended() -> None:
            with suppress(OSError):  # nobody came for what was left
                serve()

        thread = threading.Thread(target=ended)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", seen
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        thread.join()


def one_request(connection: socket.socket) -> bytes:
    """Head and body; empty if the other end closed the connection."""
    content = b""
    while b"\r\n\r\n" not in content:
        if not (more := connection.recv(65536)):
            return b""
        content += more
    head, _, body = content.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    while length and len(body) < int(length[1]):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


@pytest.fixture(scope="module")
def address(published: Registry) -> Iterator[str]:
    with listening(build_api(Service(published), frozenset(["secret"]), 4000)) as found:
        yield found


@pytest.fixture
def client(address: str) -> Client:
    return Client(address, "secret")


def test_answers_are_those_of_the_service(client: Client, api: Api, served_run: RunDir) -> None:
    local = api()
    bodies = [
        RerankRequest(**{key: one[key] for key in ("user_id", "candidates")})
        for one in requests_of(served_run)
    ]
    expected = [
        local.post("/v1/rerank", content=body.model_dump_json()).json()["results"] for body in bodies[:4]
    ]
    for body, results in zip(bodies, expected, strict=False):
        answer = client.rerank(body.candidates, body.user_id)
        assert [
            one.model_dump(exclude={"document"}) for one in answer.results
        ] == results and answer.model == "v1"
    for answer, results in zip(client.rerank_batch(bodies[:4]), expected, strict=True):
        assert [one.item_id for one in answer.results] == [one["item_id"] for one in results]
    assert [card.model_dump(mode="json") for card in client.models()] == local.get("/v1/models").json()
    user = bodies[0].user_id
    assert client.knowledge(user).model_dump(mode="json") == local.get(f"/v1/users/{user}/knowledge").json()


def test_every_option_arrives(client: Client) -> None:
    answer = client.rerank(
        [Candidate(item_id="x", text="words"), "y"],
        history=[Event(item_id="z", rating=2)],
        top_n=1,
        return_documents=True,
        model="v1",
    )
    assert [one.document for one in answer.results] == [Candidate(item_id="x", text="words")]


def test_mistakes_name_the_field(address: str, client: Client) -> None:
    """The client finds what it can before it sends anything; the rest is what the service says."""
    nowhere = Client("http://127.0.0.1:9")
    for status, field, call in (
        (422, "top_n", lambda: nowhere.rerank(["a"], "u", top_n=0)),
        (422, "candidates", lambda: nowhere.rerank([], "u")),
        (422, "give user_id or history", lambda: nowhere.rerank(["a"])),
        (422, "topn", lambda: nowhere.rerank(["a"], "u", topn=1)),
        (422, "requests", lambda: nowhere.rerank_batch([])),
        (422, "model.*not loaded; there are: v1", lambda: client.rerank(["a"], "u", model="v2")),
        (413, "larger than 4000 bytes", lambda: client.rerank(["a" * 200] * 50, "u")),
        (401, "token", lambda: Client(address).models()),
        (401, "token", lambda: Client(address, "wrong").rerank(["a"], "u")),
        (404, "not known", lambda: client.knowledge("stranger")),
    ):
        with pytest.raises(Refused, match=field) as error:
            call()
        assert error.value.status == status and isinstance(error.value, UserError)


def test_a_netrc_does_not_replace_the_token(
    client: Client, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = f"{tmp_path}/netrc"
    with open(file, "w", encoding="utf-8") as handle:
        handle.write("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", file)
    assert client.models()


@pytest.mark.parametrize("first", [HANG_UP, b"HTT", OK[:-1], refusal(502), refusal(503), refusal(504)])
def test_one_more_attempt(first: bytes) -> None:
    """A POST is sent again too, with the same body and token."""
    with peer(first, OK) as (url, seen):
        assert Client(url, "secret").models() == []
    assert len(seen) == 2 and seen[0] == seen[1] and b"Bearer secret" in seen[0]
    meta = Meta(knowledge_version="", knowledge="none", fallback=True, latency_ms=0)
    ranked = RerankResponse(id="", model="v1", results=[], meta=meta)
    with peer(first, answer(ranked.model_dump_json())) as (url, seen):
        assert Client(url).rerank(["a"], "u") == ranked
    assert len(seen) == 2 and seen[0] == seen[1] and b'"candidates":["a"]' in seen[0]


@pytest.mark.parametrize("answer", [HANG_UP, OK[:-1], refusal(502), refusal(503), refusal(504)])
def test_but_only_one(answer: bytes) -> None:
    with peer(answer, answer, OK) as (url, seen):
        with pytest.raises(Unavailable):
            Client(url).models()
        assert len(seen) == 2
        assert Client(url).models() == []


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 429, 501])
def test_what_would_not_help_is_not_repeated(status: int) -> None:
    with peer(refusal(status), OK) as (url, seen):
        with pytest.raises(Unavailable if status == 501 else Refused, match=f"{status} No: no"):
            Client(url).models()
        assert len(seen) == 1
        assert Client(url).models() == []


def test_a_kept_connection_that_was_lost() -> None:
    """As when a replica is killed between two requests: the other end closes the connection at the second one."""
    with peer(OK, HANG_UP, OK, close=False) as (url, seen):
        client = Client(url)
        assert client.models() == [] and client.models() == []
        assert len(seen) == 3


def test_a_peer_that_says_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits as long as it is told, but at most MAX_WAIT_S."""
    waited: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waited.append)
    for seconds in ("2", "86400", "Fri, 31 Dec 2100 23:59:59 GMT"):
        with peer(refusal(503, f"Retry-After: {seconds}"), OK) as (url, _):
            assert Client(url).models() == []
    assert waited == [2, 5, 5]


@pytest.mark.parametrize("header", ["soon", "-1", "1e9", ""])
def test_a_peer_that_talks_nonsense(header: str) -> None:
    with peer(refusal(503, f"Retry-After: {header}"), refusal(503)) as (url, _), pytest.raises(Unavailable):
        Client(url).models()


@pytest.mark.parametrize(
    "cut", [answer("[]")[:-1], b"HTTP/1.1 200 OK\r\ncontent-", answer("<html>"), answer("{}")]
)
def test_an_answer_that_cannot_be_read(cut: bytes) -> None:
    with peer(cut) as (url, _), pytest.raises(Unavailable):
        Client(url).models()


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(Unavailable, match=f":{port}/v1/models"):
        Client(f"http://127.0.0.1:{port}/").models()


def test_an_answer_that_does_not_come() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(Unavailable, match="timed out"):
        Client(f"http://127.0.0.1:{server.getsockname()[1]}", timeout_s=0.05).models()


def test_threads_share_a_client(client: Client, served_run: RunDir) -> None:
    lists = requests_of(served_run)

    def ask(one: dict[str, Any]) -> bool:
        found = client.rerank(one["candidates"], one["user_id"])
        return sorted(result.item_id for result in found.results) == sorted(one["candidates"])

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, lists * 3))
