"""Whole plans: what a recipe's keys and a run's manifests do to time, GPU hours and storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_ray.cli import plan as command
from dpo4rec_ray.config import load_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.pipeline import STAGES, steps
from dpo4rec_ray.planning.estimate import FinishedRun, plan, rates_of_runs, with_given
from dpo4rec_ray.planning.rates import Rate
from dpo4rec_ray.planning.sizes import sizes_of_recipe
from dpo4rec_ray.planning.work import WORK, Machine
from dpo4rec_ray.store.artifacts import Manifest, RunDir, write_json

MACHINE = Machine(cpus=2, gpus=0)
DEMO = load_config("demo")
SIZES = sizes_of_recipe(DEMO, {}, None)


def test_every_stage_has_its_work() -> None:
    assert set(WORK) == set(STAGES)


def run_of(folder: Path, start_s: float, per_unit_s: float) -> FinishedRun:
    """A finished demo whose stages take a start and so much per unit of each worker; its artifacts are 1,000 bytes each."""
    store = RunDir(folder)
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", DEMO.model_dump(mode="json"))
    own = {
        "lists": {
            "users": SIZES.users,
            "items": SIZES.items,
            "events": SIZES.interactions,
            "lists": SIZES.lists,
        },
        "pairs": {"pairs": SIZES.pairs, "heldout_pairs": SIZES.heldout_pairs},
    }
    sizes = sizes_of_recipe(DEMO, {}, None)
    for name, number in steps(DEMO):
        work = WORK[name](DEMO, sizes, MACHINE, number)
        took = work.amount / work.workers * per_unit_s
        for artifact, place in STAGES[name].writes(number):
            stats = {"work_s": took} | own.get(artifact, {})
            store.start(artifact, place)
            store.finish(Manifest(artifact, "", 10, seconds=start_s + took, stats=stats, bytes=1_000), place)
    return FinishedRun.open(DEMO, store)


def test_ten_times_the_users_take_ten_times_the_work_and_the_start_once(tmp_path: Path) -> None:
    run = run_of(tmp_path, start_s=5.0, per_unit_s=0.001)
    rates = rates_of_runs([run], MACHINE)
    large = load_config("demo", ["sample.num_users=6000"])
    sizes = sizes_of_recipe(large, {}, (run.config, run.sizes))
    found = {one.stage: one for one in plan(large, sizes, rates, MACHINE, [run]).steps}
    small = WORK["score"](DEMO, run.sizes, MACHINE, 1)
    assert found["score"].seconds == pytest.approx(5.0 + 10 * small.amount / small.workers * 0.001, rel=0.01)
    assert found["score"].bytes == pytest.approx(20_000, rel=0.01)  # scores and metric_scores
    assert found["dpo"].bytes == 1_000  # weights do not grow
    assert plan(large, sizes, rates, MACHINE, [run]).unknown == []


def test_gpus_are_paid_while_they_are_held() -> None:
    books = load_config("amazon_books", ["generate.num_engines=8", "policy.num_workers=8"])
    sizes = sizes_of_recipe(books, {}, None)
    rates = with_given({}, {"generate": 2_500, "generate.start": 100, "dpo": 1_000})
    found = plan(books, sizes, rates, Machine(64, 8))
    by_step = {(one.stage, one.round): one for one in found.steps}
    users = sizes.train + sizes.valid
    tokens = users * 10 * 256 + 0.4 * users * 400
    one = by_step["generate", 2]
    assert one.work.amount == pytest.approx(tokens) and one.work.gpus == pytest.approx(7.2)
    assert one.seconds == pytest.approx(100 + tokens / 8 / 2_500)
    assert one.gpu_hours == pytest.approx(7.2 * one.seconds / 3600)
    assert by_step["dpo", 1].seconds is not None and by_step["encode", 0].seconds is None
    assert found.unknown == [
        "prepare",
        "encode",
        "references",
        "train_reward",
        "score",
        "pair",
        "validate",
        "evaluate",
    ]
    assert found.seconds == pytest.approx(
        sum(by_step[name, r].seconds for name in ("generate", "dpo") for r in (1, 2, 3))
    )
    assert any("no rate is known of prepare, encode" in one for one in found.assumed)


def test_a_stage_with_nothing_to_do_takes_no_time() -> None:
    """Where the texts are the counted ones themselves, there are no references beside them."""
    config = load_config("demo", ['llm.source="statistics"'])
    found = {one.stage: one for one in plan(config, SIZES, {}, MACHINE).steps}
    assert found["references"].seconds == 0 and found["evaluate"].seconds is None


def test_turns_share_the_training_users_and_watch_some_of_the_others() -> None:
    turns = load_config("demo", ["run.turns_per_round=4", "run.watched_users=0.25"])
    first, second = (WORK["pair"](turns, SIZES, MACHINE, turn).amount for turn in (1, 2))
    samples = DEMO.generate.num_samples
    assert first == pytest.approx((SIZES.train / 4 + SIZES.valid) * samples)
    assert second == pytest.approx((SIZES.train / 4 + SIZES.valid / 4) * samples)
    assert (
        WORK["evaluate"](turns, SIZES, MACHINE, 4).amount == WORK["evaluate"](DEMO, SIZES, MACHINE, 1).amount
    )
    found = [(one.stage, one.round) for one in plan(turns, SIZES, {}, MACHINE).steps]
    assert found == steps(turns) and ("validate", 4) in found and ("validate", 1) not in found


def test_a_reference_that_did_not_draw_the_texts_is_one_more_pass() -> None:
    turns = load_config("demo", ["run.turns_per_round=4", "policy.objective=grpo"])
    tied = load_config(
        "demo", ["run.turns_per_round=4", "policy.objective=grpo", "policy.reference_policy=turn"]
    )
    one, two = (WORK["grpo"](config, SIZES, MACHINE, 2).amount for config in (tied, turns))
    assert two > 1.05 * one


def test_tasks_share_the_places_there_are() -> None:
    """Three fits on two CPUs take two turns; the same on four take one."""
    assert WORK["evaluate"](DEMO, SIZES, Machine(2, 0), 1).workers == 1.5
    assert WORK["evaluate"](DEMO, SIZES, Machine(4, 0), 1).workers == 3
    on_gpu = load_config("demo", ["evaluate.gpus_per_task=0.5"])
    assert WORK["evaluate"](on_gpu, SIZES, Machine(64, 1), 1).workers == 1.5


def test_pairs_share_their_prompt() -> None:
    """Of a pair: its prompt once, or twice without sharing, and two texts."""
    apart = load_config("demo", ["policy.prefix_sharing=false"])
    one, two = (WORK["dpo"](config, SIZES, MACHINE, 1).amount for config in (DEMO, apart))
    assert two / one == pytest.approx((2 * SIZES.prompt_tokens + 2 * 48) / (SIZES.prompt_tokens + 2 * 48))


@pytest.mark.parametrize(
    "given", [{"genrate": 1.0}, {"generate": 0.0}, {"generate.stop": 1.0}, {"generate.start": -1.0}]
)
def test_a_rate_that_is_none(given: dict[str, float]) -> None:
    with pytest.raises(UserError, match="--rate"):
        with_given({}, given)


def test_a_given_rate_replaces_a_measured_one_and_keeps_its_start() -> None:
    found = with_given({("score", 1): Rate(7.0, 1.0)}, {"score": 3.0})
    assert found["score", 1] == Rate(7.0, 3.0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(tmp_path / "run", 5.0, 0.001)
    call = ["demo", "sample.num_users=6000", "--from-run", str(tmp_path / "run"), "--cpus", "2"]
    assert command.main(call) == 0
    out = capsys.readouterr().out
    assert out.startswith("users           6,000 (train 4,320, valid 1,080, test 600)\n")
    assert "\nassumed:\n- users and items: sample.num_users" in out
    assert not any(line.rstrip() != line for line in out.splitlines())
    assert command.main(["demo", "--rate", "generate=fast"]) == 2
    assert "not STAGE=NUMBER" in capsys.readouterr().err
    assert command.main(["demo", "--users", "0"]) == 2
    assert command.main(["demo", "--from-run", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--rate", "generate=nan"), ("--rate", "generate.start=inf"), ("--cpus", "nan"), ("--cpus", "-3"), ("--cpus", "0"),
        ("--gpus", "nan"), ("--gpus", "-1"),
    ],
)  # fmt: skip
def test_numbers_that_are_none(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["demo", f"{flag}={value}"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {flag} {value}") and said.err.count("\n") == 1 and not said.out


def test_no_gpu_is_a_number_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["demo", "--gpus", "0"]) == 0
