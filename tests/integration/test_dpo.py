"""The dpo stage on the pairs of a finished run: real Ray Train, real DeepSpeed, two processes on gloo."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dpo4rec_ray.config.training import DPOSection
from dpo4rec_ray.policy.logps import CompletionLogps
from dpo4rec_ray.policy.model import load_model, read_policy
from dpo4rec_ray.policy.objectives import BatchLayout, DPOObjective
from dpo4rec_ray.policy.rows import ArrowRows
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.metrics_file import read_metrics
from dpo4rec_ray.train.state import read_state
from tests.conftest import DEMO, ROOT, TINY, Finished, command, kill_driver, run_job

pytestmark = pytest.mark.ray

STEP = ["--only", "dpo", "--round", "1"]
# 4 pairs a step whatever the workers are; steps that are slow and many enough to be interrupted
SMALL = ["policy.epochs=3", "policy.checkpoint_every=3", "policy.lr=0.002", "policy.chunk_tokens=1"]
ONE = [
    "policy.num_workers=1",
    "policy.batch_size=4",
    "policy.gradient_accumulation_steps=1",
    "policy.zero_stage=0",
]
FULLY = ["policy.tuning=full", "policy.lr=0.0005"]
TWO = ["policy.num_workers=2", "policy.batch_size=1", "policy.gradient_accumulation_steps=2"]


def copied(tiny_run: Finished, folder: Path) -> Path:
    """The finished run without its policy."""
    shutil.copytree(tiny_run.folder, folder / "run")
    shutil.rmtree(folder / "run/rounds/01/policy")
    return folder


def train(tiny_run: Finished, folder: Path, *changes: str) -> Finished:
    return run_job(copied(tiny_run, folder), DEMO, *TINY, *SMALL, *changes, *STEP)


def policy_folder(done: Finished) -> Path:
    return done.folder / "rounds/01/policy"


def stats(done: Finished) -> dict[str, Any]:
    return json.loads((policy_folder(done) / "manifest.json").read_text())["stats"]


def weights(done: Finished, name: str = "lora/adapter_model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(policy_folder(done) / name)


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.numel() > 0
        torch.testing.assert_close(value, other[name], atol=atol, rtol=0)


def heldout_loss(done: Finished, model: torch.nn.Module) -> float:
    """What the saved policy's loss on the held-out pairs is, by the plain path and a reference computed here.

    Of the users' own texts: there are no others in training.
    """
    store = RunDir(done.folder)
    rows = list(ArrowRows(store.read("pairs", 1, split="valid", where=[("kind", "=", "own")])))
    objective = DPOObjective(BatchLayout(0), DPOSection(beta=0.1))  # the demo's
    batch = objective.collate(rows)
    base = CompletionLogps(load_model(str(ROOT / "dpo4rec_ray/policy/bundled"), "float32"))
    with torch.no_grad():
        batch.reference = base(batch.tokens)
        loss, _ = objective(CompletionLogps(model), batch)
    return loss.item() / len(rows)


@pytest.fixture(scope="module")
def undisturbed(tiny_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    done = train(tiny_run, tmp_path_factory.mktemp("undisturbed"), *ONE)
    assert done.code == 0, done.stderr
    return done


def test_the_saved_lora_is_what_was_trained(undisturbed: Finished) -> None:
    from peft import PeftModel

    found = stats(undisturbed)
    assert found["first_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert found["last_loss"] < found["first_loss"]
    assert found["continued_after"] == []
    policy = read_policy(policy_folder(undisturbed))
    base = load_model(policy.base, "float32")
    adapted = PeftModel.from_pretrained(base, policy.lora)
    assert heldout_loss(undisturbed, adapted) == pytest.approx(found["heldout_loss"], abs=1e-5)
    assert heldout_loss(undisturbed, load_model(policy.merged, "float32")) == pytest.approx(
        found["heldout_loss"], abs=1e-5
    )


@pytest.mark.parametrize(
    "zero_stage",
    [
        3,
        pytest.param(0, marks=pytest.mark.slow),
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(2, marks=pytest.mark.slow),
    ],
)
def test_two_workers_with_zero_train_the_same_lora(
    tiny_run: Finished, undisturbed: Finished, tmp_path: Path, zero_stage: int
) -> None:
    done = train(tiny_run, tmp_path, *TWO, f"policy.zero_stage={zero_stage}")
    assert done.code == 0, done.stderr
    assert_same_weights(weights(done), weights(undisturbed), atol=1e-5)
    assert stats(done)["heldout_loss"] == pytest.approx(stats(undisturbed)["heldout_loss"], abs=1e-5)


@pytest.fixture(scope="module")
def partitioned(tiny_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Full fine-tuning, ZeRO-3 on two workers."""
    done = train(
        tiny_run,
        tmp_path_factory.mktemp("partitioned"),
        *TWO,
        *FULLY,
        "policy.zero_stage=3",
        "policy.activation_checkpointing=true",
    )
    assert done.code == 0, done.stderr
    return done


@pytest.mark.slow
def test_full_fine_tuning_partitioned_trains_the_same_weights(
    tiny_run: Finished, partitioned: Finished, tmp_path: Path
) -> None:
    one = train(tiny_run, tmp_path, *ONE, *FULLY)
    assert one.code == 0, one.stderr
    name = "full/model.safetensors"
    assert_same_weights(weights(partitioned, name), weights(one, name), atol=2e-5)


def test_full_fine_tuning_partitioned_saves_whole_weights(partitioned: Finished) -> None:
    name, two = "full/model.safetensors", partitioned
    policy = read_policy(policy_folder(two))
    assert policy.lora is None and policy.whole == policy.base == str(policy_folder(two) / "full")
    reloaded = heldout_loss(two, load_model(policy.base, "float32"))
    assert reloaded == pytest.approx(stats(two)["heldout_loss"], abs=1e-5)
    base = load_file(ROOT / "dpo4rec_ray/policy/bundled/model.safetensors")
    moved = weights(two, name)
    assert any((moved[name] - value).abs().max() > 1e-4 for name, value in base.items())


@pytest.mark.slow
def test_options_that_change_no_weight(tiny_run: Finished, undisturbed: Finished, tmp_path: Path) -> None:
    """Another reference, another layout, sharded and offloaded states, checkpoints elsewhere, trackers, a DeepSpeed file."""
    pytest.importorskip("mlflow")
    extra = tmp_path / "deepspeed.json"
    extra.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 10_000}}))
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    done = train(
        tiny_run,
        tmp_path,
        *ONE,
        "policy.zero_stage=2",
        "policy.offload_optimizer=true",
        'policy.reference="lora_off"',
        "policy.prefix_sharing=false",
        "policy.packing=false",
        f'policy.deepspeed="{extra}"',
        f'policy.storage_path="file://{checkpoints}"',
        'run.trackers=["tensorboard", "mlflow"]',
    )
    assert done.code == 0, done.stderr
    found, expected = (read_metrics(policy_folder(run)) for run in (done, undisturbed))
    assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in expected], abs=1e-6)
    # Adam divides by a gradient's size: where one is next to nothing, its rounding moves a weight by a share of lr
    assert_same_weights(weights(done), weights(undisturbed), atol=5e-5)
    assert list(checkpoints.rglob("*.pt")) == []  # removed with the last step
    folder = policy_folder(done)
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "mlflow.db").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "sharding",
    [
        ["policy.zero_stage=1"],
        ["policy.zero_stage=3", "policy.offload_params=true", "policy.offload_optimizer=true"],
    ],
    ids=["zero1", "zero3-offload"],
)
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_half_precision(tiny_run: Finished, tmp_path: Path, sharding: list[str], tuning: str) -> None:
    done = train(tiny_run, tmp_path, *TWO, *sharding, 'llm.dtype="bfloat16"', f'policy.tuning="{tuning}"')
    assert done.code == 0, done.stderr
    found = stats(done)
    assert found["first_loss"] == pytest.approx(0.693147, abs=2e-2)
    assert found["last_loss"] < found["first_loss"]
    name = "lora/adapter_model.safetensors" if tuning == "lora" else "full/model.safetensors"
    assert all(value.numel() for value in weights(done, name).values())
    reloaded = heldout_loss(done, load_model(read_policy(policy_folder(done)).whole, "float32"))
    assert reloaded == pytest.approx(found["heldout_loss"], abs=2e-2)


@pytest.mark.slow
def test_a_second_round_against_the_base_llm(tmp_path: Path) -> None:
    """reference_policy "base": round 2 trains round 1's LoRA on, against the LLM that round 1 started from."""
    done = run_job(
        tmp_path, DEMO, *TINY, *ONE, "run.num_rounds=2", "run.patience=2", 'policy.reference_policy="base"'
    )
    assert done.code == 0, done.stderr
    first, second = (read_policy(done.folder / f"rounds/0{number}/policy") for number in (1, 2))
    assert first.base == second.base
    manifest = json.loads((done.folder / "rounds/02/policy/manifest.json").read_text())
    assert manifest["stats"]["reference"] == "base LLM"
    one, two = (load_file(Path(policy.lora) / "adapter_model.safetensors") for policy in (first, second))
    assert one.keys() == two.keys()
    assert any((one[name] - two[name]).abs().max() > 1e-5 for name in one)


def workers_of(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def steps_done(folder: Path) -> int:
    file = folder / "run/rounds/01/policy/metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def continued_after(folder: Path) -> list[int]:
    state = read_state(folder / "run/rounds/01/policy")
    return state.continued_after if state else []


def start(folder: Path, *changes: str, address: str = "") -> subprocess.Popen[Any]:
    return subprocess.Popen(
        command(DEMO, *TINY, *SMALL, *changes, *STEP, f"run.root={folder}", "run.name=run"),
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": address, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_steps(process: subprocess.Popen[Any], folder: Path, count: int) -> None:
    wait_for(process, lambda: steps_done(folder) >= count)


def wait_for(process: subprocess.Popen[Any], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_worker_and_a_killed_driver_change_nothing(
    tiny_run: Finished, undisturbed: Finished, tmp_path: Path
) -> None:
    """Both continue from the last checkpoint, and the weights at the end are those of the run that nobody disturbed."""
    copied(tiny_run, tmp_path)
    process = start(tmp_path, *ONE, "policy.checkpoint_every=1")  # which makes the steps slow enough, too
    wait_for_steps(process, tmp_path, 4)
    for worker in workers_of(process):
        worker.send_signal(signal.SIGKILL)
    wait_for(process, lambda: continued_after(tmp_path) != [])
    wait_for_steps(process, tmp_path, steps_done(tmp_path) + 2)
    kill_driver(process)
    done = run_job(tmp_path, DEMO, *TINY, *SMALL, *ONE, *STEP)
    assert done.code == 0, done.stderr
    continued = stats(done)["continued_after"]
    assert len(continued) == 2 and 0 < continued[0] < continued[1]
    assert_same_weights(weights(done), weights(undisturbed), atol=1e-6)
    lines = (policy_folder(done) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, stats(done)["steps"] + 1))


def test_long_pairs_are_counted_and_training_stops_when_it_no_longer_helps(
    tiny_run: Finished, tmp_path: Path
) -> None:
    store = RunDir(tiny_run.folder)
    pairs = store.read("pairs", 1).to_pylist()
    longest = [
        len(row["prompt_token_ids"])
        + max(len(row["chosen_token_ids"]), *(len(one) for one in row["rejected_token_ids"]))
        for row in pairs
    ]
    limit = max(longest) - 1
    done = train(
        tiny_run,
        tmp_path,
        *ONE,
        f"policy.max_length={limit}",
        "policy.lr=0.5",  # far too much: the held-out loss rises
        "policy.eval_every=1",
        "policy.patience=2",
        "policy.epochs=20",
    )
    assert done.code == 0, done.stderr
    found = stats(done)
    too_long = found["rows"]["train_too_long"] + found["rows"]["valid_too_long"]
    assert too_long == sum(length > limit for length in longest) > 0
    assert f"{too_long} pairs are longer than {limit} tokens" in done.stdout
    losses = {int(step): loss for step, loss in found["heldout_losses"].items()}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 2 < 20  # stopped two evaluations after the best
    assert found["heldout_loss"] == losses[best]  # and the best was kept


def test_a_mistake_that_a_worker_finds_ends_with_one_line(tiny_run: Finished, tmp_path: Path) -> None:
    done = train(tiny_run, tmp_path, *ONE, 'policy.lora_targets=["nothing_like_it"]')
    assert done.code == 2
    assert "policy.lora_targets" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
