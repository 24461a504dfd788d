"""What stands for a model in records and in the keys of stored figures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
