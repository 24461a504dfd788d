"""Items described by the LLM, and an encode stage that goes on where it was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_ray.knowledge.prompts import item_text
from dpo4rec_ray.store.artifacts import RunDir
from tests.conftest import DEMO, run_job

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]

RECIPE = [
    DEMO,
    "sample.num_users=60",
    "sample.num_items=60",
    "generate.users_per_shard=16",
    "generate.num_engines=1",
    "generate.max_new_tokens=16",
    "prompt.describe_items=true",
    "--only",
    "encode",
    "--round",
    "0",
]


def texts(store: RunDir) -> dict[tuple[str, int], str]:
    rows = store.read("knowledge", 0, columns=["subject", "subject_id", "text"]).to_pylist()
    return {(row["subject"], row["subject_id"]): row["text"] for row in rows}


def test_items_are_described_and_finished_shards_are_kept(tmp_path: Path) -> None:
    assert run_job(tmp_path, *RECIPE[:-4], "--only", "prepare").code == 0
    done = run_job(tmp_path, *RECIPE)
    assert done.code == 0, done.stderr
    store = RunDir(done.folder)
    items = store.read("items").to_pylist()
    first = texts(store)
    assert len(first) == 60 + len(items)
    own = {item["item_id"]: item_text(item["title"], item["attributes"]) for item in items}
    described = {item_id for item_id, text in own.items() if first["item", item_id] != text}
    failed = store.failed("knowledge", 0)
    not_described = [row["subject_id"] for row in failed.to_pylist() if row["subject"] == "item"]
    assert described == set(own) - set(not_described) and len(described) > len(own) / 2

    folder = store.path("knowledge", 0)
    (folder / "manifest.json").unlink()
    for number in (1, 4):  # a shard of users; the only one of items comes after the users' four
        (folder / f"part-{number:05d}.parquet").unlink()
    kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("part-*.parquet")}
    again = run_job(tmp_path, *RECIPE)
    assert again.code == 0, again.stderr
    assert "44 users kept from an interrupted run" in again.stdout
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert texts(store) == first
