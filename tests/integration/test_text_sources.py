"""Texts from an endpoint and from files, through the whole job: a real vLLM server on this machine, and real files."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo4rec_ray import checks
from dpo4rec_ray.config import load_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.prompts import item_text
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.texts.sources import SOURCES
from tests.conftest import DEMO, ROOT, Finished, run_job

KEY = "key-that-nobody-may-see"
NUM_SAMPLES = 3
SMALL = [
    "sample.num_users=60",
    "sample.num_items=60",
    f"generate.num_samples={NUM_SAMPLES}",
    "generate.users_per_shard=8",
    "generate.num_engines=1",
    "reranker.epochs=1",
    'reranker.knowledge="input"',  # on so few lists a branch is left out, and then all rewards tie
    "reward.num_redraws=1",
    "reward.num_folds=1",
    "evaluate.num_seeds=1",
    "evaluate.num_resamples=100",
    "llm.path=/nowhere",  # is not looked at
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of the bundled LLM behind vLLM's own server, which wants a key."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "server.log"
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        "dpo4rec_ray/policy/bundled",
    ]
    command += [
        "--served-model-name",
        "toy",
        "--dtype",
        "float32",
        "--max-model-len",
        "400",
        "--enforce-eager",
    ]
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--distributed-executor-backend", "uni"]
    env = {
        **os.environ,
        "VLLM_API_KEY": KEY,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less: the worker lives in the engine's
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with open(log, "wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def openai(server: str, *more: str) -> list[str]:
    return [
        DEMO,
        *SMALL,
        "llm.source=openai",
        f"openai.base_url={server}",
        "openai.model=toy",
        "openai.api_key_env=TOY_KEY",
        *more,
    ]


@pytest.fixture(scope="module")
def written(server: str, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A whole run with texts about users and items from the server."""
    folder = tmp_path_factory.mktemp("openai")
    prices = ["openai.input_price=1", "openai.output_price=4", "prompt.describe_items=true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOY_KEY", KEY)
        done = run_job(folder, *openai(server, *prices))
    assert done.code == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def texts(store: RunDir) -> dict[tuple[int, int], str]:
    return {
        (row["user_id"], row["sample_id"]): row["text"] for row in store.read("generations", 1).to_pylist()
    }


@pytest.mark.ray
@pytest.mark.vllm
def test_an_endpoint_writes_n_texts_per_user(written: Finished) -> None:
    store = RunDir(written.folder)
    splits = {user["user_id"]: user["split"] for user in store.read("users").to_pylist()}
    sampled = [user for user, split in splits.items() if split != "test"]
    found = texts(store)
    assert set(found) == {(user, sample) for user in sampled for sample in range(NUM_SAMPLES)}
    assert all(len({found[user, sample] for sample in range(NUM_SAMPLES)}) > 1 for user in sampled)
    assert sum("drama" in text for text in found.values()) > len(found) / 20  # of the sample world's words
    rows = store.read("generations", 1).to_pylist()
    assert not any(row["token_ids"] or row["prompt_token_ids"] for row in rows)
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert store.require("pairs", 1).rows > 0 and written.summary


@pytest.mark.ray
@pytest.mark.vllm
def test_tokens_requests_and_cost_are_in_the_manifests(written: Finished) -> None:
    store = RunDir(written.folder)
    stats = store.require("generations", 1).stats
    users = stats["users"]
    assert stats["requests"] == users and stats.get("retries", 0) == stats["failed"] == 0
    assert 20 * users < stats["prompt_tokens"] < 400 * users
    assert users * NUM_SAMPLES < stats["tokens"] <= 48 * users * NUM_SAMPLES
    assert stats["cost"] == pytest.approx((stats["prompt_tokens"] + 4 * stats["tokens"]) / 1e6, abs=1e-6)
    knowledge = store.require("knowledge", 0).stats
    items = knowledge["items"]
    assert knowledge["requests"] == 60 and items["requests"] == store.require("items").rows
    both = [knowledge[name] + items[name] for name in ("prompt_tokens", "tokens")]
    assert knowledge["cost"] == pytest.approx((both[0] + 4 * both[1]) / 1e6, abs=1e-6)


@pytest.mark.ray
@pytest.mark.vllm
def test_items_are_described(written: Finished) -> None:
    store = RunDir(written.folder)
    rows = store.read("knowledge", 0).to_pylist()
    own = [item_text(item["title"], item["attributes"]) for item in store.read("items").to_pylist()]
    described = [row["text"] for row in rows if row["subject"] == "item"]
    assert len(described) == len(own) and not set(described) & set(own)


@pytest.mark.ray
@pytest.mark.vllm
def test_the_key_is_nowhere(written: Finished) -> None:
    """Neither in the run folder nor in what Ray logged on this machine."""
    began = (written.folder / "config.json").stat().st_mtime
    ray_logs = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
    sessions = [found for found in ray_logs.glob("session_2*/logs") if found.stat().st_mtime >= began]
    agents = [file for session in sessions for file in session.glob("runtime_env_agent.log")]
    assert any(b"OMP_NUM_THREADS" in file.read_bytes() for file in agents)  # whole environments are in there
    for folder in (written.folder, *sessions):
        for file in folder.rglob("*"):
            assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    assert KEY not in written.stdout + written.stderr


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.slow
def test_the_same_seeds_again_in_other_requests(
    written: Finished, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other shards, fewer at a time: a user's first text depends on the user's seed alone. JSON where it is asked for."""
    monkeypatch.setenv("TOY_KEY", KEY)
    before = texts(RunDir(written.folder))
    more = ["generate.users_per_shard=50", "openai.max_concurrency=2"]
    for step in ("prepare", "generate"):
        done = run_job(tmp_path, *openai(server, *more), "--only", step)
        assert done.code == 0, done.stderr
    again = texts(RunDir(tmp_path / "run"))
    assert again.keys() == before.keys()
    assert sum(again[key] == before[key] for key in before) > 0.95 * len(before)  # batches round differently
    as_json = ["generate.format=json", "generate.max_new_tokens=150", "generate.user_frac=0.2"]
    done = run_job(tmp_path, *openai(server, *more, *as_json), "--only", "generate")
    assert done.code == 0, done.stderr
    store = RunDir(tmp_path / "run")
    stats = store.require("generations", 1).stats
    opening = re.compile(r'\s*\{\s*"genre"\s*:\s*"|genre: ')  # JSON as it came, or read as sentences
    assert stats["samples"] > 0 and all(opening.match(text) for text in texts(store).values())
    assert stats["invalid_json"] <= stats["clipped"]  # nothing but the length limit ends a JSON too soon


@pytest.mark.ray
@pytest.mark.vllm
def test_a_wrong_key_ends_the_job_in_one_line(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_KEY", "wrong-key-of-mine")
    assert run_job(tmp_path, *openai(server), "--only", "prepare").code == 0
    done = run_job(tmp_path, *openai(server), "--only", "generate")
    lines = done.stderr.strip().splitlines()
    assert done.code == 2 and len(lines) == 1, done.stderr
    assert re.match(r"error: endpoint http://\S+ refuses the key in TOY_KEY \(401\)", lines[0])
    assert "wrong-key-of-mine" not in done.stdout + done.stderr
    assert not (tmp_path / "run" / "rounds" / "01" / "generations" / "manifest.json").exists()


# Texts written elsewhere.


def table(folder: Path, *more: str) -> list[str]:
    return [
        DEMO,
        *SMALL,
        "llm.source=table",
        f"texts.users={folder / 'users.parquet'}",
        f"texts.items={folder / 'items.jsonl'}",
        *more,
    ]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, dict[str, Any]]:
    """A whole run with texts from files that lack some users and items, and hold unknown ones and damage."""
    folder = tmp_path_factory.mktemp("table")
    assert run_job(folder, DEMO, *SMALL, "llm.source=statistics", "--only", "prepare").code == 0
    store = RunDir(folder / "run")
    users = store.read("users").to_pylist()
    train = [user for user in users if user["split"] == "train"]
    missing, short = train[0], train[1]
    rows = [("nobody-1", "x"), ("nobody-2", "x")]
    for sample in range(NUM_SAMPLES + 1):  # one more than is asked for
        rows += [
            (user["raw_id"], f"Text {sample} about {user['raw_id']}: likes drama.")
            for user in users
            if user is not missing and (user is not short or sample < 2)
        ]
    ids, written = zip(*rows, strict=True)
    pq.write_table(pa.table({"user_id": ids, "text": written}), folder / "users.parquet")
    items = store.read("items").to_pylist()
    lines = [json.dumps({"item_id": item["raw_id"], "text": f"About {item['title']}"}) for item in items[1:]]
    (folder / "items.jsonl").write_text("\n".join([*lines, '{"item_id": "cut']))
    done = run_job(folder, *table(folder))
    assert done.code == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done, {"users": users, "items": items, "missing": missing, "short": short, "folder": folder}


@pytest.mark.ray
def test_texts_of_a_table_are_samples_in_file_order(told: tuple[Finished, dict[str, Any]]) -> None:
    done, known = told
    store = RunDir(done.folder)
    expected = {
        (user["user_id"], sample): f"Text {sample} about {user['raw_id']}: likes drama."
        for user in known["users"]
        if user["split"] != "test" and user not in (known["missing"], known["short"])
        for sample in range(NUM_SAMPLES)
    }
    assert texts(store) == expected
    failed = {
        row["subject_id"]: (row["reason"], row["detail"])
        for row in store.failed("generations", 1).to_pylist()
    }
    assert failed == {
        known["missing"]["user_id"]: ("no_text", ""),
        known["short"]["user_id"]: ("missing_samples", "2 of 3 texts"),
    }
    assert store.require("generations", 1).stats["failed_by_reason"] == {"no_text": 1, "missing_samples": 1}
    assert done.summary


@pytest.mark.ray
def test_every_user_and_item_is_encoded(told: tuple[Finished, dict[str, Any]]) -> None:
    done, known = told
    store = RunDir(done.folder)
    found = {
        (row["subject"], row["subject_id"]): row["text"] for row in store.read("knowledge", 0).to_pylist()
    }
    for user in known["users"]:
        own = "" if user is known["missing"] else f"Text 0 about {user['raw_id']}: likes drama."
        assert found["user", user["user_id"]] == own
    first, *others = known["items"]
    assert found["item", first["item_id"]] == item_text(first["title"], first["attributes"])
    assert all(found["item", item["item_id"]] == f"About {item['title']}" for item in others)
    failed = Counter((row["subject"], row["reason"]) for row in store.failed("knowledge", 0).to_pylist())
    assert failed == {("user", "no_text"): 1, ("item", "no_text"): 1}


@pytest.mark.ray
def test_what_is_wrong_with_the_files_is_said_once(told: tuple[Finished, dict[str, Any]]) -> None:
    done, _ = told
    assert done.stdout.count("2 x unknown id (row 1: 'nobody-1', row 2: 'nobody-2')") == 1
    assert done.stdout.count("1 x not a JSON object (line 60)") == 1


def test_a_changed_file_is_another_policy_0(tmp_path: Path) -> None:
    for name in ("users.jsonl", "items.jsonl"):
        (tmp_path / name).write_text('{"user_id": "1", "item_id": "1", "text": "a"}\n')

    def identity(*more: str) -> str:
        files = [f"texts.users={tmp_path / 'users.jsonl'}", f"texts.items={tmp_path / 'items.jsonl'}"]
        config = load_config(DEMO, [*SMALL, "llm.source=table", *files, *more])
        checks.check_all(config)
        return SOURCES[config.llm.source].identity(config, RunDir(tmp_path))

    first = identity()
    assert identity() == first
    assert identity("texts.items=") != first
    (tmp_path / "items.jsonl").write_text('{"item_id": "1", "text": "abc"}\n')
    assert identity() != first and str(tmp_path) not in first


def test_rounds_need_more_than_one_text_per_user(tmp_path: Path) -> None:
    (tmp_path / "user.klg").write_text('{"1": {"prompt": "", "ans": "a"}}')
    changes = [*SMALL, "llm.source=table", f"texts.users={tmp_path / 'user.klg'}"]
    checks.check_all(load_config(DEMO, [*changes, "run.num_rounds=0"]))
    with pytest.raises(UserError, match=r"one text per user.*run.num_rounds = 0"):
        checks.check_all(load_config(DEMO, [*changes, "run.num_rounds=1"]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["llm.source=openai"], "openai.model is not set"),
        (["llm.source=openai", "openai.model=m", "openai.base_url=localhost:8000/v1"], "no http.s. address"),
        (["llm.source=openai", "openai.model=m", "openai.base_url=http://[oops/v1"], "no http.s. address"),
        (
            ["llm.source=openai", "openai.model=m", "openai.base_url=http://me:s3cret@host/v1"],
            "user name, password",
        ),
        (
            ["llm.source=openai", "openai.model=m", "openai.base_url=https://host/v1?key=s3cret"],
            "password or query",
        ),
        (
            ["llm.source=openai", "openai.model=m", "openai.api_key_env=sk-s3cret"],
            "no name of an environment",
        ),
        (["llm.source=openai", "openai.model=m", "openai.api_key_env=BAD_KEY"], "BAD_KEY holds spaces"),
        (["llm.source=openai", "openai.model=m", "run.num_rounds=2"], "is not trained"),
        (["llm.source=table"], "texts.users is not set"),
        (["llm.source=table", "texts.users=/nowhere.jsonl"], "texts.users /nowhere.jsonl: no such file"),
        (["llm.source=table", "texts.users=user.klg"], "user.klg: no such file"),
        (["llm.source=statistics", "prompt.describe_items=true"], "writes nothing about items"),
    ],
)
def test_mistakes_are_found_before_the_run(
    changes: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAD_KEY", "s3cret\n")
    with pytest.raises(UserError, match=words) as raised:
        checks.check_all(load_config(DEMO, [*SMALL, *changes]))
    assert "s3cret" not in str(raised.value)
