"""Two rounds in which both sides move: the reward's rerankers are trained anew on the first round's texts, and its pairs are
kept."""

from __future__ import annotations

import json

import pytest

from dpo4rec_ray.rerankers.fit import WEIGHTS_FILE
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.final import final_policy
from tests.conftest import DEMO, TINY, run_job

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]

ROUNDS = [
    "run.num_rounds=2",
    "run.patience=2",  # so that a first round that is no better ends nothing
    "run.retrain_reward=true",
    "run.keep_pairs=true",
    'reward.reader=["llm"]',
    "reranker.knowledge=input",  # trained together, so that other texts make other weights
]


def test_both_sides_move(tmp_path_factory: pytest.TempPathFactory) -> None:
    done = run_job(tmp_path_factory.mktemp("rounds"), DEMO, *TINY, *ROUNDS)
    assert done.code == 0, done.stdout[-2000:] + done.stderr[-4000:]
    store = RunDir(done.folder)
    # The rerankers of round 2 are others, trained on the texts of policy 1, and score its texts.
    first, second = (store.path("reward", number) / "fold-0" / WEIGHTS_FILE for number in (0, 2))
    assert second.parent.parent == store.root / "rounds/02/reward"
    assert first.read_bytes() != second.read_bytes()
    assert set(store.require("reward", 2).inputs) >= {"knowledge/1", "knowledge/0"}
    assert "reward/2" in store.require("scores", 2).inputs and "reward/0" in store.require("scores", 1).inputs
    assert set(store.require("heldout", 2).inputs) >= {"reward/0"}, "one yardstick for all rounds"
    # The pairs of both rounds are trained on.
    one, two = (store.require("pairs", number).stats for number in (1, 2))
    assert two["earlier_pairs"] == one["pairs"] > 0
    trained = store.require("policy", 2).stats["rows"]
    assert trained["train"] + trained["train_too_long"] == two["pairs"] + two["earlier_pairs"]
    summary = done.summary
    # What the second round changed, and what both did.
    first, second = summary["rounds"]
    assert second["figures_since_base"].keys() == second["figures"].keys()
    since = second["figures_since_base"]["reward"]
    assert since["after"] == pytest.approx(second["figures"]["reward"]["after"], abs=1e-5)
    if first["heldout_users"] == second["heldout_users"]:
        assert since["before"] == pytest.approx(first["figures"]["reward"]["before"], abs=1e-5)
    # The best round is the run's, and a round that is no better says why.
    final = final_policy(store)
    assert final and (final.round, final.policy) == (summary["best_round"], summary["best_policy"])
    assert json.loads((store.root / "final/policy.json").read_text())["why"] in done.stdout
    for one in summary["rounds"]:
        why = one["choice"].get("why", [])
        assert bool(why) != one["choice"]["kept"]
        assert all(f"why: {sentence}" in done.stdout for sentence in why)
