"""What stands for a model in records and keys, and what policy.json says of a policy's weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.model import PolicyWeights, read_policy, write_policy
from dpo4rec_ray.store.policies import model_identity


def test_a_folder_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = model_identity(str(tmp_path))
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert model_identity(str(tmp_path)) != first


def test_a_hub_name_is_known_by_its_commit(tmp_path: Path) -> None:
    """From the cache that the tokenizer was read through; no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "hub/models--someone--llm"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text(commit)
    (model / f"snapshots/{commit}").mkdir(parents=True)
    (model / f"snapshots/{commit}/config.json").write_text("{}")
    code = "from dpo4rec_ray.store.policies import model_identity; print(model_identity('someone/llm'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == f"someone/llm@{commit}", done.stderr


def test_a_hub_name_that_cannot_be_looked_up_is_known_by_its_name(tmp_path: Path) -> None:
    code = "from dpo4rec_ray.store.policies import model_identity; print(model_identity('someone/llm'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "someone/llm", done.stderr


def test_a_policy_is_written_relative_to_its_folder(tmp_path: Path) -> None:
    weights = PolicyWeights(base="someone/llm", lora=str(tmp_path / "lora"))
    write_policy(tmp_path, weights, {"round": 1})
    stored = json.loads((tmp_path / "policy.json").read_text())
    assert stored == {"base": "someone/llm", "lora": "./lora", "merged": None, "round": 1}
    assert read_policy(tmp_path) == weights


def test_a_policy_of_an_older_release_names_its_lora_adapter(tmp_path: Path) -> None:
    old = {"base": "someone/llm", "adapter": "./adapter", "merged": "./merged", "figures": {"steps": 3}}
    (tmp_path / "policy.json").write_text(json.dumps(old))
    found = read_policy(tmp_path)
    assert found == PolicyWeights("someone/llm", str(tmp_path / "adapter"), str(tmp_path / "merged"))
    (tmp_path / "policy.json").write_text('{"base": "someone/llm"}')
    with pytest.raises(UserError, match="train it again"):
        read_policy(tmp_path)
