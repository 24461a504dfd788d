"""`jobs/serve.py run` with Ray Serve and HAProxy: its answers over HTTP, changes of versions, and its end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests

from dpo4rec_ray.serving.api import RerankRequest
from dpo4rec_ray.serving.client import Client
from dpo4rec_ray.serving.deployment import NO_TOKEN
from dpo4rec_ray.serving.haproxy import free_ports
from dpo4rec_ray.serving.registry import ROUTING_FILE, Registry
from dpo4rec_ray.serving.service import Service
from dpo4rec_ray.store.artifacts import RunDir
from tests.conftest import ROOT
from tests.serving_world import MODELS, offline_scores, requests_of, serve

pytestmark = pytest.mark.ray
INTERRUPTED = "interrupted; the same command goes on from here\n"
START_S = 300  # a wait that only a server that does not work lasts


@dataclass
class Server:
    """A server and the registry that it follows."""

    process: subprocess.Popen[str]
    url: str
    registry: Registry
    errors: Path  # what it writes to standard error

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the server has done something by itself."""
        end = time.monotonic() + START_S
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None
            time.sleep(0.1)

    def answers(self) -> str:
        """The version that answers now."""
        return Client(self.url).rerank(["a"], "somebody").model

    def ready(self) -> dict[str, Any]:
        return requests.get(f"{self.url}/readyz", timeout=30).json()


def started(published: Registry, folder: Path, *settings: str) -> Server:
    """A server that starts, on a copy of a registry."""
    registry, errors = Registry(shutil.copytree(published.root, folder / "registry")), folder / "errors"
    (port,) = free_ports(1)
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "jobs/serve.py", "run", "--registry", str(registry.root), f"serving.port={port}", *settings],
            cwd=ROOT,
            env={**os.environ, "RAY_ADDRESS": ""},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )  # fmt: skip
    return Server(process, f"http://127.0.0.1:{port}", registry, errors)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_end_while_it_starts(published: Registry, tmp_path: Path, number: signal.Signals) -> None:
    """Before there is a server. The replica waits for its tokens, so that it cannot be faster than the signal."""
    os.mkfifo(tmp_path / "tokens")
    server = started(published, tmp_path, f"serving.token_file={tmp_path / 'tokens'}")
    process = psutil.Process(server.process.pid)
    server.until(lambda: "haproxy" in {one.name() for one in process.children(recursive=True)})
    children = process.children(recursive=True)
    server.process.send_signal(number)
    printed, _ = server.process.communicate(timeout=START_S)
    assert (server.process.returncode, printed, server.errors.read_text()) == (130, "", INTERRUPTED)
    _, left = psutil.wait_procs(children, timeout=30)
    assert not left


@pytest.fixture(scope="module")
def server(published: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = started(published, tmp_path_factory.mktemp("served"), "serving.poll_s=0.2")
    assert found.process.stdout
    assert found.process.stdout.readline() == f"{NO_TOKEN}\n"
    assert found.process.stdout.readline().startswith(f"v1 answers at {found.url}/v1/rerank; try it at ")
    try:
        assert found.process.poll() is None
        yield found
    finally:
        found.process.terminate()
        found.process.wait(START_S)


@pytest.fixture(scope="module")
def lists(served_run: RunDir) -> list[dict[str, Any]]:
    return [{key: one[key] for key in ("user_id", "candidates")} for one in requests_of(served_run)]


@pytest.fixture(scope="module")
def expected(served_run: RunDir) -> dict[str, list[np.ndarray]]:
    """Version -> the evaluation's scores of the lists."""
    return {name: offline_scores(served_run, MODELS[name]) for name in ("v1", "v2", "v3")}


def scores_of(answer: dict[str, Any]) -> list[float]:
    """In the order of the request."""
    return [one["relevance_score"] for one in sorted(answer["results"], key=lambda one: one["index"])]


def test_http_answers_as_the_service_does(
    server: Server, published: Registry, lists: list[dict[str, Any]]
) -> None:
    service, client = Service(published), Client(server.url)
    bodies = [RerankRequest.model_validate(one) for one in lists]
    together = client.rerank_batch(bodies)
    for body, batched in zip(bodies, together, strict=True):
        local = asyncio.run(service.rerank(body))
        for answer in (batched, client.rerank(body.candidates, body.user_id)):
            assert answer.model == local["model"] == "v1"
            assert [one.index for one in answer.results] == [one["index"] for one in local["results"]]
            np.testing.assert_allclose(
                [one.relevance_score for one in answer.results],
                [one["relevance_score"] for one in local["results"]],
                atol=1e-5,
            )
    user = bodies[0].user_id or ""
    assert client.knowledge(user) == asyncio.run(service.knowledge(user))
    assert {card.id: card.serves for card in client.models()}["v1"] == "current"
    assert "<html" in requests.get(server.url, timeout=30).text


def test_clients_of_other_apis_through_the_proxy(server: Server, lists: list[dict[str, Any]]) -> None:
    body = {"query": lists[0]["user_id"], "documents": lists[0]["candidates"]}
    own = requests.post(f"{server.url}/v1/rerank", json=lists[0], timeout=30).json()["results"]
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        found = requests.post(f"{server.url}{path}", json=body, timeout=30).json()["results"]
        assert [one["index"] for one in found] == [one["index"] for one in own]
    tei = {"query": body["query"], "texts": body["documents"]}
    found = requests.post(f"{server.url}/rerank", json=tei, timeout=30).json()
    assert [one["index"] for one in found] == [one["index"] for one in own]


def test_metrics_count_what_was_answered(server: Server) -> None:
    def answered() -> float:
        text = requests.get(f"{server.url}/metrics", timeout=30).text
        counts = [line for line in text.splitlines() if line.startswith("dpo4rec_serve_answers_total{")]
        return sum(float(line.split()[-1]) for line in counts)

    before = answered()
    for _ in range(7):
        server.answers()
    assert answered() == before + 7


def test_a_promotion_while_requests_run(
    server: Server, lists: list[dict[str, Any]], expected: dict[str, list[np.ndarray]]
) -> None:
    """No request fails, and every answer has the scores of the version that it names."""
    stop, seen, failures = threading.Event(), [], []

    def ask(first: int) -> None:
        place = first
        with requests.Session() as session:  # which repeats nothing
            while not stop.is_set():
                place = (place + 1) % len(lists)
                try:
                    answer = session.post(f"{server.url}/v1/rerank", json=lists[place], timeout=60)
                    assert answer.status_code == 200, answer.text
                    found = answer.json()
                    np.testing.assert_allclose(scores_of(found), expected[found["model"]][place], atol=1e-5)
                    seen.append(found["model"])
                except Exception as error:
                    failures.append(error)
                    return

    threads = [threading.Thread(target=ask, args=(first,)) for first in (0, 9, 18)]
    for thread in threads:
        thread.start()
    try:
        for version in ("v2", "v3", "v1"):
            ((code, _, errors),) = serve(["promote", version, "--registry", str(server.registry.root)])
            assert code == 0, errors
            server.until(lambda version=version: server.answers() == version)
        server.until(lambda: seen[-50:] == ["v1"] * 50)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]
    assert set(seen) == {"v1", "v2", "v3"}


def test_a_broken_version_is_refused(server: Server, lists: list[dict[str, Any]]) -> None:
    """A version breaks after promote has checked it: the old one still answers, and /readyz says why."""
    server.registry.promote("v1")
    server.until(lambda: server.ready()["versions"][0] == "v1")
    before = requests.post(f"{server.url}/v1/rerank", json=lists[0], timeout=30).json()
    broken = shutil.copytree(server.registry.folder("v2"), server.registry.folder("broken"))
    weights = broken / "reranker" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    now = server.registry.routing()
    routing = replace(now, current="broken", previous=(*now.previous, "v1"), number=now.number + 1)
    replaced(server.registry.root / ROUTING_FILE, json.dumps(asdict(routing)))
    server.until(lambda: "broken" in server.ready()["refused"])
    after = requests.post(f"{server.url}/v1/rerank", json=lists[0], timeout=30).json()
    assert after["model"] == "v1" and after["results"] == before["results"]
    assert server.registry.rollback().current == "v1"
    server.until(lambda: server.ready()["refused"] == "")
    server.registry.promote("v2")
    server.until(lambda: server.answers() == "v2")


def replaced(file: Path, content: str) -> None:
    temporary = file.with_suffix(".new")
    temporary.write_text(content, encoding="utf-8")
    temporary.rename(file)


def controllers(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [one for one in children if "ServeController" in one.name()]


def test_a_dead_controller_is_replaced(server: Server, lists: list[dict[str, Any]]) -> None:
    (controller,) = controllers(server)
    controller.kill()
    server.until(lambda: controller not in (found := controllers(server)) and len(found) == 1)
    assert requests.post(f"{server.url}/v1/rerank", json=lists[0], timeout=60).status_code == 200


def test_it_ends_with_all_that_it_started(server: Server) -> None:
    """SIGTERM ends it and all its processes; so does a second signal, and a request on its way. Nothing else was said in
    all its life, whatever these tests did to it. The last test of this file."""
    started = psutil.Process(server.process.pid).children(recursive=True)
    assert {"haproxy", "raylet"} <= {one.name() for one in started}
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as half:
        half.sendall(b"POST /rerank HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{")
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGINT)
        assert server.process.stdout
        assert server.process.stdout.read() == "stopped\n"
    assert server.process.wait(START_S) == 0
    assert server.errors.read_text() == ""
    _, left = psutil.wait_procs(started, timeout=30)
    assert not left
    with pytest.raises(requests.ConnectionError):
        server.ready()
