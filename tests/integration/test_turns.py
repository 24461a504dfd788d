"""Two turns in a round: each samples other users by the newest policy, scores and trains; the last one ends the round."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dpo4rec_ray.policy.batch import collate
from dpo4rec_ray.policy.logps import CompletionLogps
from dpo4rec_ray.policy.model import load_model, read_policy
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.metrics_file import read_metrics
from tests.conftest import DEMO, ROOT, TINY, Finished, command, kill_driver, run_job, until

pytestmark = pytest.mark.ray

TURNS = [
    "run.turns_per_round=2",
    "run.watched_users=0.6",
    'policy.objective=["best_of_n", "grpo"]',
    "policy.num_workers=1",
    "policy.zero_stage=0",
    "policy.batch_size=4",
    "policy.gradient_accumulation_steps=1",
    "policy.lr=0.002",
    "policy.epochs=2",
    "policy.patience=0",
    "generate.token_logps=true",
    "generate.top_p=1",
    "generate.keep_engines=true",
    "grpo.sampler=corrected",
]


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    done = run_job(tmp_path_factory.mktemp("turns"), DEMO, *TINY, *TURNS)
    assert done.code == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def sampled(store: RunDir, turn: int, split: str) -> set[int]:
    users = store.read("users", split=split, columns=["user_id"])["user_id"].to_pylist()
    return set(store.read("generations", turn, columns=["user_id"])["user_id"].to_pylist()) & set(users)


def test_turns_sample_other_training_users_and_watch_the_same(turns: Finished) -> None:
    store = RunDir(turns.folder)
    first, second = (sampled(store, turn, "train") for turn in (1, 2))
    everybody = store.read("users", split="train", columns=["user_id"])["user_id"].to_pylist()
    assert not first & second and first | second == set(everybody)
    assert len(first) > 5 and len(second) > 5
    watched, everybody = sampled(store, 2, "valid"), sampled(store, 1, "valid")
    assert watched < everybody and len(everybody) > len(watched) > len(everybody) / 3
    assert store.require("scores", 2).stats["watched"]["reading"]["users"] == len(watched)


def test_the_second_turn_goes_on_from_the_first_and_is_pulled_to_the_base(turns: Finished) -> None:
    store = RunDir(turns.folder)
    one, two = (store.require("policy", turn).stats for turn in (1, 2))
    assert (one["objective"], two["objective"]) == ("best_of_n", "grpo")
    assert two["reference"] == "base LLM" and two["staleness"] == two["steps"] - 1 > 0
    steps = read_metrics(store.path("policy", 2))
    assert steps[0]["off_policy"] == pytest.approx(0, abs=1e-6), "the policy that drew the texts"
    assert steps[0]["kl_per_token"] > 1e-4, "which is not the reference"
    bases = {read_policy(store.path("policy", turn)).base for turn in (1, 2)}
    assert len(bases) == 1, "one LoRA on the base LLM is trained on"


def test_the_engines_log_probabilities_are_those_of_the_policy(turns: Finished) -> None:
    """Of the second turn: of policy 1, at the temperature, by other kernels; the weights were exchanged in place."""
    store = RunDir(turns.folder)
    model = CompletionLogps(
        load_model(read_policy(store.path("policy", 1)).whole, "float32"), per_token=True, temperature=0.9
    )
    rows = store.read("generations", 2).slice(0, 12).to_pylist()
    for row in rows:
        with torch.no_grad():
            expected = model(collate([row["prompt_token_ids"]], [row["token_ids"]], 0))
        torch.testing.assert_close(torch.tensor(row["token_logps"]), expected, atol=1e-3, rtol=0)
    assert store.require("policy", 2).stats["engine_gap"] < 1e-3


def test_only_the_round_is_encoded_validated_and_evaluated(turns: Finished) -> None:
    store = RunDir(turns.folder)
    assert store.manifest("knowledge", 1) is None and store.manifest("heldout", 1) is None
    summary = json.loads((turns.folder / "summary.json").read_text())
    [one] = summary["rounds"]
    assert (one["round"], one["policy"], len(one["turns"])) == (1, 2, 2)
    assert one["samples"] == sum(store.require("generations", turn).rows for turn in (1, 2))
    assert summary["best_round"] in (0, 1) and summary["best_policy"] == 2 * summary["best_round"]
    systems = {row["system"] for row in summary["systems"]}
    assert "dpo4rec-round1" in systems and "dpo4rec-round2" not in systems
    assert "turn 2: " in turns.stdout and "watched users since the round began" in turns.stdout
    assert "watched users since the round began" in (turns.folder / "report.html").read_text()


def weights(folder: Path) -> torch.Tensor:
    found = load_file(folder / "rounds/02/policy/lora/adapter_model.safetensors")
    return torch.cat([found[name].flatten() for name in sorted(found)])


SAMPLING, TRAINING = "rounds/02/generations/part-00001.parquet", "rounds/02/policy/metrics.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "victim"),
    [(SAMPLING, ""), (TRAINING, ""), (SAMPLING, "KeptEngine"), (TRAINING, "RayTrainWorker")],
    ids=["sampling", "training", "an engine", "a training worker"],
)
def test_what_is_killed_in_a_turn_goes_on(turns: Finished, tmp_path: Path, file: str, victim: str) -> None:
    """SIGKILL in the middle of the second turn, of the driver ("") or one of its processes: the run, or the same command again,
    ends with the same samples and weights."""
    place = [f"run.root={tmp_path}", "run.name=run"]
    line = command(DEMO, *TINY, *TURNS, "policy.checkpoint_every=1", *place)
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # Of the trainer, some steps: from the first checkpoint on it goes on from one.
    lines = 4 if victim == "RayTrainWorker" else 0
    begun = tmp_path / "run" / file
    until(lambda: begun.exists() and begun.read_bytes().count(b"\n") >= lines, 400)
    if victim:
        chosen = called(process, victim)[0]
        chosen.kill()
        assert process.wait(timeout=400) == 0, "the run heals by itself"
        assert not chosen.is_running()
        done = Finished(tmp_path / "run", 0, "", "")
    else:
        kill_driver(process)
        done = run_job(tmp_path, DEMO, *TINY, *TURNS, "policy.checkpoint_every=1")
        assert done.code == 0, done.stderr[-3000:]
    columns = ["user_id", "sample_id", "token_ids"]
    order = [("user_id", "ascending"), ("sample_id", "ascending")]
    before, after = (
        RunDir(one).read("generations", 2, columns=columns).sort_by(order)
        for one in (turns.folder, done.folder)
    )
    assert before.equals(after), "nothing lost, nothing doubled"
    torch.testing.assert_close(weights(done.folder), weights(turns.folder), atol=5e-5, rtol=0)
    if victim == "RayTrainWorker":
        assert len(RunDir(done.folder).require("policy", 2).stats["continued_after"]) == 1


def called(process: subprocess.Popen[bytes], name: str) -> list[psutil.Process]:
    """The processes of a job whose command line has the name."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name in " ".join(child.cmdline()):
                found.append(child)
    return found
