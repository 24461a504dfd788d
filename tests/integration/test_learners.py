"""GRPO and best-of-N on the scored texts of a finished run: real Ray Train, real DeepSpeed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from dpo4rec_ray.core.policy_gradient import advantages
from dpo4rec_ray.policy.batch import collate
from dpo4rec_ray.policy.logps import CompletionLogps
from dpo4rec_ray.policy.model import load_model, read_policy
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.metrics_file import read_metrics
from dpo4rec_ray.train.reference_logps import read_reference
from dpo4rec_ray.train.scored_texts import ARTIFACTS, groups_of
from tests.conftest import DEMO, ROOT, TINY, Finished, command, kill_driver, run_job, until

pytestmark = pytest.mark.ray

SMALL = ["policy.epochs=3", "policy.lr=0.002", "policy.patience=0"]
ONE = ["policy.num_workers=1", "policy.batch_size=4", "policy.gradient_accumulation_steps=1"]
TWO = ["policy.num_workers=2", "policy.batch_size=1", "policy.gradient_accumulation_steps=2"]


def train(tiny_run: Finished, folder: Path, objective: str, *changes: str) -> Finished:
    """The stage alone, on a copy of the run without its policy."""
    if not (folder / "run").exists():
        shutil.copytree(tiny_run.folder, folder / "run")
        shutil.rmtree(folder / "run/rounds/01/policy")
    step = ["--only", objective, "--round", "1"]
    return run_job(folder, DEMO, *TINY, *SMALL, f"policy.objective={objective}", *changes, *step)


def stats(done: Finished) -> dict[str, Any]:
    assert done.code == 0, done.stderr
    return RunDir(done.folder).require("policy", 1).stats


def weights(done: Finished) -> torch.Tensor:
    found = load_file(done.folder / "rounds/01/policy/lora/adapter_model.safetensors")
    return torch.cat([found[name].flatten() for name in sorted(found)])


@pytest.fixture(scope="module")
def grpo(tiny_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train(tiny_run, tmp_path_factory.mktemp("grpo"), "grpo", *ONE, "policy.zero_stage=0")


def test_grpo_starts_at_the_policy_that_drew_the_texts(grpo: Finished) -> None:
    found, steps = stats(grpo), read_metrics(grpo.folder / "rounds/01/policy")
    assert found["objective"] == "grpo"
    assert found["first_loss"] == pytest.approx(0, abs=1e-5)
    assert steps[0]["ratio"] == pytest.approx(1, abs=1e-5)
    assert steps[0]["kl_per_token"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["kl_per_token"] > 1e-4, "the policy has moved"
    assert steps[-1]["gain"] > steps[0]["gain"] + 0.05, "towards the better texts"
    assert 0 < found["rows"]["train"] <= 43 and found["rows"]["valid"] == 11


def test_the_stored_log_probabilities_are_the_base_llms_at_the_temperature(grpo: Finished) -> None:
    """By the plain path, of the users of the first part."""
    store = RunDir(grpo.folder)
    scored = groups_of([store.files(name, 1)[0] for name in ARTIFACTS])
    [reference] = (store.path("scores", 1) / "reference").iterdir()
    stored = {row["user_id"]: row["logps"] for row in read_reference(reference).to_pylist()}
    base = load_model(read_policy(store.path("policy", 1)).base, "float32")
    logps = CompletionLogps(base, per_token=True, temperature=0.9)
    for row in scored.to_pylist():
        for text, own in zip(row["completions"], stored[row["user_id"]], strict=True):
            with torch.no_grad():
                expected = logps(collate([row["prompt_token_ids"]], [text], 0))
            torch.testing.assert_close(torch.tensor(own), expected, atol=1e-4, rtol=0)


def test_the_trained_policy_prefers_the_better_texts(grpo: Finished) -> None:
    """From the saved weights: log-ratios rise with advantages, in training users."""
    store = RunDir(grpo.folder)
    policy = read_policy(store.path("policy", 1))
    trained = store.read("users", split="train", columns=["user_id"])["user_id"].to_pylist()
    before, after = (CompletionLogps(load_model(one, "float32")) for one in (policy.base, policy.merged))
    moved, better = [], []
    scored = groups_of([store.files(name, 1)[0] for name in ARTIFACTS])
    for row in scored.to_pylist():
        own = advantages(torch.tensor(row["rewards"]).numpy(), "std")
        if own is None or row["user_id"] not in trained:
            continue
        batch = collate([row["prompt_token_ids"]] * len(own), row["completions"], 0)
        with torch.no_grad():
            moved.append(after(batch) - before(batch))
        better.append(torch.tensor(own))
    both = torch.stack([torch.cat(moved), torch.cat(better)])
    assert torch.corrcoef(both)[0, 1] > 0.3


@pytest.mark.slow
def test_two_workers_with_zero_train_the_same_policy(
    tiny_run: Finished, grpo: Finished, tmp_path: Path
) -> None:
    done = train(tiny_run, tmp_path, "grpo", *TWO, "policy.zero_stage=2")
    assert stats(done)["heldout_loss"] == pytest.approx(stats(grpo)["heldout_loss"], abs=1e-5)
    torch.testing.assert_close(weights(done), weights(grpo), atol=5e-5, rtol=0)


def test_best_of_n_makes_the_best_texts_likelier(tiny_run: Finished, tmp_path: Path) -> None:
    done = train(tiny_run, tmp_path, "best_of_n", *ONE, "policy.zero_stage=0")
    found = stats(done)
    assert found["objective"] == "best_of_n" and found["last_loss"] < found["first_loss"]
    assert not (RunDir(done.folder).path("scores", 1) / "reference").exists(), "it has no reference"


@pytest.mark.slow
def test_a_killed_driver_goes_on(tiny_run: Finished, grpo: Finished, tmp_path: Path) -> None:
    """SIGKILL in the middle of training; the same command ends with the same weights."""
    changes = [
        *TINY,
        *SMALL,
        *ONE,
        "policy.zero_stage=0",
        "policy.objective=grpo",
        "policy.checkpoint_every=2",
    ]
    shutil.copytree(tiny_run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/rounds/01/policy")
    place = [f"run.root={tmp_path}", "run.name=run"]
    line = command(DEMO, *changes, "--only", "grpo", "--round", "1", *place)
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = tmp_path / "run/rounds/01/policy/metrics.jsonl"
    until(lambda: file.exists() and len(file.read_text().splitlines()) >= 5, 240)
    kill_driver(process)
    first, *others = sorted((tmp_path / "run/rounds/01/scores/reference").glob("*/part-*.parquet"))
    first.unlink()  # as if it had been killed in the reference's pass, too
    done = train(tiny_run, tmp_path, "grpo", *ONE, "policy.zero_stage=0", "policy.checkpoint_every=2")
    kept = sum(pq.read_metadata(other).num_rows for other in others)
    assert kept and f"reference: {kept} users kept from an interrupted run" in done.stdout
    assert json.loads(file.read_text().splitlines()[-1])["step"] == stats(done)["steps"]
    assert stats(done)["continued_after"]
    torch.testing.assert_close(weights(done), weights(grpo), atol=5e-5, rtol=0)
