"""Prompts that kill or hang every engine: their users are set aside and named, and all others get their texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_ray.config import load_config
from dpo4rec_ray.knowledge.catalogue_prompts import CataloguePrompts
from dpo4rec_ray.knowledge.prompts import control_tokens, encode_chat
from dpo4rec_ray.policy.model import load_tokenizer
from dpo4rec_ray.store.artifacts import RunDir
from tests.conftest import DEMO, ROOT, run_job

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos]

RECIPE = [
    DEMO,
    "sample.num_users=30",
    "generate.num_samples=3",
    "generate.users_per_shard=8",
    "generate.num_engines=2",
    "generate.keep_engines=false",
    "generate.stall_timeout_s=6",
    'generate.engine_args={logits_processors = ["tests.integration.poison:Poison"]}',
]


@pytest.mark.parametrize("how", ["kill", "hang"])
def test_a_poison_prompt_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    from tests.integration.poison import HOW, is_poison

    monkeypatch.setenv(HOW, how)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run_job(tmp_path, *RECIPE, "--only", "prepare").code == 0
    store = RunDir(tmp_path / "run")
    config = load_config(ROOT / DEMO, RECIPE[1:])
    tokenizer = load_tokenizer(str(ROOT / "dpo4rec_ray/policy/bundled"))
    prompts = CataloguePrompts(store.read("items"), control_tokens(tokenizer), config.prompt)
    users = store.read("users", split=("train", "valid")).to_pylist()
    poisonous = {
        user["user_id"]
        for user in users
        if is_poison(
            encode_chat(
                tokenizer,
                prompts.user(user["profile"], user["history_item_ids"], user["history_ratings"]),
            )
        )
    }
    assert 0 < len(poisonous) < 5, "this test needs another seed"
    done = run_job(tmp_path, *RECIPE, "--only", "generate", "--round", "1")
    assert done.code == 0, done.stderr
    failed = store.failed("generations", 1).to_pylist()
    assert {row["subject_id"] for row in failed} == poisonous
    assert {row["reason"] for row in failed} == {"engine_died"}
    if how == "hang":
        assert {row["detail"] for row in failed} == {"no new token for 6 s"}
    assert f"{len(failed)} users without 3 samples" in done.stdout
    rows = store.read("generations", 1, columns=["user_id"])["user_id"].to_pylist()
    assert sorted(rows) == sorted(3 * [user["user_id"] for user in users if user["user_id"] not in poisonous])
