"""Published versions for the tests of serving: fixtures `served_run`, `published`, `registry` and `api`.

`served_run`: a finished run on the sample world, without an LLM; made once per session in about a minute.
`published`: its registry, for reading alone: v1 (PRM with knowledge) answers, v2 (another seed), v3 (no knowledge) and mir
(MIR, which reads histories) are there too.
`registry`: a copy that a test may change.
`api`: a function (registry, tokens, max_body, **keys of [serving]) -> a client of the HTTP application in this process;
its clients live as long as the module's tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import DEMO, ROOT, TINY, made_once, run_job

# Every test session loads this file: what imports torch is imported by the fixtures.
if TYPE_CHECKING:
    import numpy as np
    from starlette.testclient import TestClient
    from starlette.types import ASGIApp

    from dpo4rec_ray.rerankers.fit import ListData
    from dpo4rec_ray.serving.registry import Registry
    from dpo4rec_ray.store.artifacts import RunDir

SETTINGS = [
    *TINY,
    "llm.source=statistics",
    "run.num_rounds=0",
    'evaluate.backbones=["prm", "mir"]',
    'reranker.per_backbone.mir={knowledge="input"}',  # and PRM's is behind the backbone, the default
]
MODELS = {
    "v1": "prm-statistics-seed0",
    "v2": "prm-statistics-seed1",
    "v3": "prm-backbone-seed0",
    "mir": "mir-statistics-seed0",
}
OPENED = ("prm-statistics-seed0", "prm-statistics-seed1")  # their branch counts: `open_branch`
MAX_BODY = 4 * 2**20
END = "end of command: "

Api = Callable[..., "TestClient"]


@pytest.fixture(scope="session")
def served_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Two backbones with and without knowledge, two seeds each."""
    from dpo4rec_ray.store.artifacts import RunDir

    def make(folder: Path) -> None:
        done = run_job(folder, DEMO, *SETTINGS)
        assert done.code == 0, done.stdout[-2000:] + done.stderr[-4000:]
        for model in OPENED:
            open_branch(RunDir(done.folder), model)

    return RunDir(made_once(tmp_path_factory, "served", make) / "run")


@pytest.fixture(scope="session")
def published(served_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """All four versions; v1 answers. Not to be changed."""
    from dpo4rec_ray.config import read_config
    from dpo4rec_ray.serving.publish import publish
    from dpo4rec_ray.serving.registry import Registry

    found = Registry(tmp_path_factory.mktemp("published") / "registry")
    config = read_config(served_run.root)
    for name, model in MODELS.items():
        publish(config, served_run, found.folder(name), name, model)
    found.promote("v1")
    return found


@pytest.fixture
def registry(published: Registry, tmp_path: Path) -> Registry:
    """A copy of `published` that a test may change."""
    from dpo4rec_ray.serving.registry import Registry

    return Registry(shutil.copytree(published.root, tmp_path / "registry"))


@pytest.fixture(scope="module")
def api(published: Registry) -> Iterator[Api]:
    """Opens clients, and closes them at the end."""
    from starlette.testclient import TestClient

    from dpo4rec_ray.config.serving import ServingSection
    from dpo4rec_ray.serving.http import build_api
    from dpo4rec_ray.serving.service import Service

    with ExitStack() as opened:

        def start(
            registry: Registry = published,
            tokens: tuple[str, ...] = (),
            max_body: int = MAX_BODY,
            **settings: int,
        ) -> TestClient:
            application = build_api(
                Service(registry, ServingSection.model_construct(**settings)), frozenset(tokens), max_body
            )
            # One event loop for all requests of a client, as in a replica; an error of ours is a 500, not an exception.
            return opened.enter_context(TestClient(application, raise_server_exceptions=False))

        yield start


def serve(*commands: Sequence[str]) -> list[tuple[int, str, str]]:
    """Run jobs/serve.py's command lines one after the other in one process, so that torch is loaded once.

    Returns:
        Per command the exit code, and what it wrote to standard output and standard error.
    """
    code = (
        "import json, sys; from dpo4rec_ray.cli import serve\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    code = serve.main(command)\n"
        "    for stream in (sys.stdout, sys.stderr): print(f'{END}{code}', file=stream, flush=True)"
    ).replace("{END}", END)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    out, errors = (re.split(rf"{END}(\d+)\n", text) for text in (done.stdout, done.stderr))
    return list(zip(map(int, out[1::2]), out[::2], errors[::2], strict=False))


@contextmanager
def listening(application: ASGIApp) -> Iterator[str]:
    """The application under uvicorn on a free port of this machine; its address."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(application, port=0, log_level="warning", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended before it listened"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def requests_of(store: RunDir) -> list[dict[str, Any]]:
    """Every test list of a run as the body of a request, with the labels of its candidates as `labels`."""
    items = store.read("items", columns=["raw_id"])["raw_id"].to_pylist()
    users = store.read("users", columns=["raw_id"])["raw_id"].to_pylist()
    return [
        {
            "user_id": users[row["user_id"]],
            "history": [
                {"item_id": items[item], "rating": rating}
                for item, rating in zip(row["history_item_ids"], row["history_ratings"], strict=True)
            ],
            "candidates": [items[item] for item in row["candidate_item_ids"]],
            "labels": row["labels"],
        }
        for row in store.read("lists", split="test").to_pylist()
    ]


def offline_scores(store: RunDir, model: str) -> list[np.ndarray]:
    """What the evaluate stage computes for every test list with a fit that it saved: [n] logits per list."""
    scores, lists = _scored(store, model)
    return [row[real] for row, real in zip(scores, lists.mask.numpy(), strict=True)]


def _scored(store: RunDir, model: str, round_id: int = 0) -> tuple[np.ndarray, ListData]:
    """Scores [n, L] of the test lists with the texts of a round, and the lists."""
    from dpo4rec_ray.rerankers.fit import load_reranker
    from dpo4rec_ray.rerankers.scorer import ListScorer
    from dpo4rec_ray.store.reading import read_catalogue, read_list_data, read_vectors

    catalogue, lists = read_catalogue(store), read_list_data(store, "test")
    fitted = load_reranker(store.path("per_list") / "rerankers" / model, catalogue)
    vectors = read_vectors(store, round_id, "user")[1] if fitted.knowledge else None
    scores = ListScorer([fitted], catalogue).score(
        lists.item_ids, lists.mask, vectors, lists.user_rows, lists.histories
    )
    return scores, lists


def open_branch(store: RunDir, model: str, round_id: int = 0) -> None:
    """Let the texts of a round count in their fit, as if validation had shown their gain, and measure it again for its card.

    A dozen validation users show none, and texts that change no score would hide mistakes of serving.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from dpo4rec_ray.core.metrics import list_metrics
    from dpo4rec_ray.evaluation.systems import HEADLINE
    from dpo4rec_ray.rerankers.card import CARD_FILE, read_card
    from dpo4rec_ray.store.artifacts import write_json

    folder = store.path("per_list") / "rerankers" / model
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"branch.gates": torch.tensor([0.5, 0.3])}, folder / "model.safetensors")
    scores, lists = _scored(store, model, round_id)
    measured = list_metrics(scores, lists.labels.numpy(), HEADLINE, lists.mask.numpy())
    card = read_card(folder)
    card["info"]["metrics"] |= {f"test {name}": float(values.mean()) for name, values in measured.items()}
    write_json(folder / CARD_FILE, card)
