"""Texts for users whom no version knows, with the real vLLM, encoder, Ray Serve and HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import psutil
import pytest
import requests
from safetensors.torch import load_file, save_file

from dpo4rec_ray.config import read_config
from dpo4rec_ray.config.serving import ServingSection
from dpo4rec_ray.serving.fresh_texts import TextJob
from dpo4rec_ray.serving.publish import publish
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.version_files import WRITER_FOLDER, WRITER_LLM, read_card, table, write_card
from dpo4rec_ray.serving.writer import JobPrompts
from dpo4rec_ray.serving.writer_setup import read_setup
from dpo4rec_ray.store.artifacts import RunDir
from tests.conftest import ROOT, Finished
from tests.serving_world import open_branch

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

# v1: texts by the base LLM, which has a name; v2: by the policy of round 1, whose weights travel with the version.
MODELS = {"v1": "prm-base-llm-seed0", "v2": "prm-dpo4rec-round1-seed0", "v3": "prm-backbone-seed0"}
QUEUE = 2


@pytest.fixture(scope="module")
def llm_registry(tiny_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Versions of a run whose texts an LLM wrote. The run itself is removed."""
    store = RunDir(shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("run") / "run"))
    found = Registry(tmp_path_factory.mktemp("registry"))
    for round_id, name in enumerate(("v1", "v2")):
        open_branch(store, MODELS[name], round_id)
    for name, model in MODELS.items():
        publish(read_config(store.root), store, found.folder(name), name, model)
    # One round of a tiny run changes few texts.
    weights = found.folder("v2") / WRITER_FOLDER / WRITER_LLM / "model.safetensors"
    save_file({name: 0.8 * value for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    found.promote("v1")
    shutil.rmtree(store.root)
    return found


@dataclass(frozen=True)
class Server:
    """A server on this machine, and the requests of the tests."""

    url: str
    process: subprocess.Popen[str]
    candidates: list[str]
    history: list[dict[str, Any]]

    def body(self, user_id: str) -> dict[str, Any]:
        return {"user_id": user_id, "history": self.history, "candidates": self.candidates}

    def rerank(self, user_id: str) -> dict[str, Any]:
        answer = requests.post(f"{self.url}/v1/rerank", json=self.body(user_id), timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def rerank_all(self, user_ids: list[str]) -> list[dict[str, Any]]:
        body = {"requests": [self.body(user_id) for user_id in user_ids]}
        answer = requests.post(f"{self.url}/v1/rerank/batch", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["responses"]

    def knowledge(self, user_id: str) -> requests.Response:
        return requests.get(f"{self.url}/v1/users/{user_id}/knowledge", timeout=60)

    def fresh(self, user_id: str, version: str) -> dict[str, Any]:
        """The first answer that uses a text written for the user."""

        def answer() -> dict[str, Any] | None:
            found = self.rerank(user_id)
            return found if found["meta"]["knowledge"] == "fresh" and found["model"] == version else None

        return wait_for(answer)

    def text(self, user_id: str, version: str) -> str:
        """The text of that answer."""
        self.fresh(user_id, version)
        return self.knowledge(user_id).json()["text"]

    def metric(self, name: str) -> float:
        lines = requests.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.startswith(f"dpo4rec_serve_fresh_{name}")
        )


def wait_for(look: Callable[[], Any], timeout_s: float = 400) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.2)
    pytest.fail(f"waited {timeout_s:g} s in vain")


def scores(answer: dict[str, Any]) -> dict[str, float]:
    return {one["item_id"]: one["relevance_score"] for one in answer["results"]}


@pytest.fixture(scope="module")
def server(llm_registry: Registry) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "port": port,
        "online_llm": "async",
        "cpus_per_replica": 0.5,
        "writer_cpus": 0.5,
        "fresh_queue": QUEUE,
        "fresh_retry_s": 1,
    }
    changes = [f"serving.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "jobs/serve.py", "run", "--registry", str(llm_registry.root), *changes]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "RAY_ADDRESS": ""}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        wait_for(lambda: "answers at" in process.stdout.readline() or process.poll() is not None)
        assert process.poll() is None
        url = f"http://127.0.0.1:{port}"
        examples = requests.get(f"{url}/v1/examples", timeout=60).json()
        candidates = [one["item_id"] for one in examples[0]["candidates"]]
        history = [{"item_id": one, "rating": 5.0} for one in candidates[:4]]
        yield Server(url, process, candidates, history)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


def test_a_version_carries_what_its_llm_needs(llm_registry: Registry) -> None:
    own = {name: llm_registry.folder(name) / WRITER_FOLDER for name in MODELS}
    assert (own["v1"] / "config.json").is_file() and not (own["v1"] / WRITER_LLM).exists()
    assert (own["v2"] / WRITER_LLM / "model.safetensors").is_file()
    assert not own["v3"].exists()
    named = (own["v2"] / "config.json").read_text()
    assert str(llm_registry.root) not in named and "raw_dir" not in named and "api_key" not in named


def test_a_new_user_is_asked_about_as_the_run_asked(llm_registry: Registry, tiny_run: Finished) -> None:
    store = RunDir(tiny_run.folder)
    users = {row["user_id"]: row for row in store.read("users").to_pylist()}
    asked = {row["user_id"]: row["prompt_token_ids"] for row in store.read("generations", 1).to_pylist()}
    setup = read_setup(llm_registry, "v1", ServingSection())
    prompts = JobPrompts(setup, table(llm_registry.folder("v1") / "items.arrow"))
    assert len(asked) > 20
    for user_id, token_ids in asked.items():
        items, ratings = users[user_id]["history_item_ids"], users[user_id]["history_ratings"]
        # what came before the history that the run shows is left out
        longer = TextJob("v1", "somebody", [0] * 5 + items, [1.0] * 5 + ratings)
        shown = longer if len(items) == setup.config.data.max_history else TextJob("v1", "x", items, ratings)
        assert prompts.token_ids(shown) == token_ids


def test_later_requests_of_a_new_user_rest_on_a_text(server: Server) -> None:
    first = server.rerank("newcomer")
    assert first["meta"]["knowledge"] == "none" and first["meta"]["fallback"]
    later = server.fresh("newcomer", "v1")
    assert later["meta"]["fallback"], "the user is still none that the version knows"
    assert scores(later) != scores(first)
    assert scores(server.rerank("newcomer")) == scores(later)
    known = server.knowledge("newcomer").json()
    assert known["knowledge"] == "fresh" and known["version"] == "v1" and len(known["text"].split()) > 3
    assert server.knowledge("somebody else").status_code == 404


def test_many_requests_of_a_user_make_one_text(server: Server) -> None:
    before = server.metric("seconds_count")
    assert {one["meta"]["knowledge"] for one in server.rerank_all(["popular"] * 50)} <= {"none", "fresh"}
    server.fresh("popular", "v1")
    server.rerank_all(["popular"] * 50)
    server.fresh("after that", "v1")  # texts are written in the order in which they were asked for
    assert server.metric("seconds_count") == before + 2


def test_a_full_queue_refuses_and_reranks_go_on(server: Server) -> None:
    before = server.metric("refused_total")
    users = [f"one of many {number}" for number in range(60)]
    answers = server.rerank_all(users)
    assert {one["meta"]["knowledge"] for one in answers} == {"none"}
    assert all(len(one["results"]) == len(server.candidates) for one in answers)
    wait_for(lambda: server.metric("refused_total") > before)
    server.fresh(users[-1], "v1")  # it is asked for again when there is room
    wait_for(lambda: server.metric("waiting") == 0)
    assert server.metric("failed_total") == 0


def test_the_writer_goes_over_to_another_version(server: Server, llm_registry: Registry) -> None:
    travellers = [f"traveller {number}" for number in range(6)]
    before = [server.text(user_id, "v1") for user_id in travellers]
    llm_registry.promote("v2")
    after = [server.text(user_id, "v2") for user_id in travellers]
    assert after != before, "the same seeds, but another policy"
    llm_registry.promote("v3")
    wait_for(lambda: server.rerank(travellers[0])["model"] == "v3")
    assert server.rerank(travellers[0])["meta"]["knowledge"] == "none", "v3 reads no texts"
    llm_registry.promote("v1")
    assert server.text(travellers[0], "v1") == before[0], "what was written stays with its version"
    assert server.text("another traveller", "v1")


def writer_of(server: Server) -> psutil.Process:
    children = psutil.Process(server.process.pid).children(recursive=True)
    (found,) = [one for one in children if "ServeReplica:rerank:writer" in " ".join(one.cmdline())]
    return found


@pytest.mark.slow
@pytest.mark.chaos
def test_a_killed_writer_comes_back_and_reranks_go_on_meanwhile(server: Server) -> None:
    writer = writer_of(server)
    writer.kill()
    writer.wait(timeout=30)
    for number in range(20):
        assert server.rerank(f"patient {number}")["meta"]["knowledge"] == "none"
    server.fresh("patient 0", "v1")


@pytest.mark.slow
def test_a_version_that_needs_another_engine_gets_another_process(
    server: Server, llm_registry: Registry
) -> None:
    folder = llm_registry.folder("v4")
    shutil.copytree(llm_registry.folder("v1"), folder)
    write_card(folder, replace(read_card(folder), version="v4"))
    config = json.loads((folder / WRITER_FOLDER / "config.json").read_text())
    config["llm"]["max_model_len"] -= 32
    (folder / WRITER_FOLDER / "config.json").write_text(json.dumps(config))
    before = writer_of(server)
    llm_registry.promote("v4")
    server.fresh("mover", "v4")
    assert writer_of(server).pid != before.pid
