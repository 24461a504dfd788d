"""Whole runs on lists that are split by time, and on logged ones: every stage keeps to the splits."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo4rec_ray.store.artifacts import RunDir
from tests.conftest import DEMO, TINY, run_job

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]
STAY = ["reranker.resample_negatives=false", "reward.num_redraws=0"]


def keeps_to_the_splits(store: RunDir) -> None:
    """Pairs are of users with training lists, held-out rewards of validation users; test lists alone are in eval."""
    lists = store.read("lists").to_pylist()
    split_of = {row["user_id"]: row["split"] for row in store.read("users").to_pylist()}
    has = {
        name: {row["user_id"] for row in lists if row["split"] == name} for name in ("train", "valid", "test")
    }
    sampled = set(store.read("generations", 1)["user_id"].to_pylist())
    assert all(split_of[user] != "test" for user in sampled)
    for pair in store.read("pairs", 1).to_pylist():
        assert pair["split"] == split_of[pair["user_id"]]
        assert {pair["user_id"], pair["rejected_user_id"]} <= has[pair["split"]]
    heldout = set(store.read("heldout", 1)["user_id"].to_pylist())
    assert heldout and heldout <= {user for user in has["valid"] if split_of[user] == "valid"}
    tested = set(store.read("per_list")["list_id"].to_pylist())
    assert tested == {row["list_id"] for row in lists if row["split"] == "test"}
    num_lists = {row["user_id"]: row["num_lists"] for row in store.read("scores", 1).to_pylist()}
    for user, number in num_lists.items():
        assert number <= sum(row["user_id"] == user and row["split"] == split_of[user] for row in lists)


def test_a_run_on_lists_split_by_time(tmp_path) -> None:
    done = run_job(tmp_path, DEMO, *TINY, *STAY, "data.protocol=time", "data.test_frac=0.2")
    assert done.code == 0, done.stdout[-2000:] + done.stderr[-4000:]
    keeps_to_the_splits(RunDir(done.folder))


def test_a_run_on_logged_lists_of_varying_length(tmp_path) -> None:
    """The lists of a first run become the log of a second one, some of them cut short."""
    first = run_job(tmp_path / "first", DEMO, *TINY, "--only", "prepare")
    assert first.code == 0, first.stderr
    store = RunDir(first.folder)
    items, users = (store.read(name)["raw_id"].to_pylist() for name in ("items", "users"))
    rows = []
    for number, row in enumerate(store.read("lists").to_pylist()):
        size = 10 - number % 4
        rows.append(
            {
                "user_id": users[row["user_id"]],
                "candidate_item_ids": [items[item] for item in row["candidate_item_ids"]][:size],
                "labels": row["labels"][:size],
                "shown_at": row["timestamp_s"],
                "split": row["split"],
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "lists.parquet")
    logged = [f"logged.file={tmp_path / 'lists.parquet'}", "logged.timestamp=shown_at", "logged.split=split"]
    done = run_job(tmp_path / "second", DEMO, *TINY, *STAY, *logged)
    assert done.code == 0, done.stdout[-2000:] + done.stderr[-4000:]
    store = RunDir(done.folder)
    keeps_to_the_splits(store)
    assert {len(labels) for labels in store.read("lists")["labels"].to_pylist()} == {7, 8, 9, 10}
    # the same histories as where the lists came from: what was before the first list
    before, after = (
        {row["raw_id"]: row["history_item_ids"] for row in run.read("users").to_pylist()}
        for run in (RunDir(first.folder), store)
    )
    assert before == after
