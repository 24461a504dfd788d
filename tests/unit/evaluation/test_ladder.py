"""The ladder: verdicts from intervals, rungs in the order of the chain, and only those that the run has figures for."""

from __future__ import annotations

from typing import Any

import pytest

from dpo4rec_ray.evaluation.heldout_pairs import judged_users
from dpo4rec_ray.evaluation.ladder import FAILS, HOLDS, NOT_SHOWN, first_broken, ladder, printed


def figure(before: float, after: float, spread: float = 0.01) -> dict[str, Any]:
    found: dict[str, Any] = {"users": 9}
    for name, value in (("before", before), ("after", after), ("change", after - before)):
        found |= {name: value, f"{name}_ci95": [value - spread, value + spread]}
    return found


REWARD = {"shuffle_drop": 0.09, "shuffle_drop_ci95": [0.05, 0.13]}
SCORES = {
    "spread": 0.2,
    "carried": 0.4,
    "gap_held_out": 0.1,
    "gap_held_out_ci95": [0.05, 0.15],
    "best tied": 0.1,
}
POLICY = {"accuracy": 0.75, "rows": {"valid": 108}}
HELDOUT = {
    "figures": {
        "reward": figure(-2.2, -2.1),
        "reading": figure(0.25, 0.39),
        "reading_ndcg": figure(0.1, 0.16),
        "others_reward": figure(-2.45, -2.49),
        "fit_above": figure(0.12, 0.18),
    }
}
COMPARISONS = [
    {
        "backbone": "prm",
        "system": system,
        "against": against,
        "metric": metric,
        "delta": 0.1,
        "ci95": [0.06, 0.14],
    }
    for system, against in (
        ("dpo4rec-round1", "base-llm"),
        ("dpo4rec-round2", "base-llm"),
        ("base-llm", "backbone"),
    )
    for metric in ("map_paper@5", "ndcg@5")
]


def gain(value: float, std_error: float) -> dict[str, float]:
    return {"gain": value, "std_error": std_error}


def rungs(**changes: Any) -> dict[str, Any]:
    found = {
        "reward": REWARD,
        "scores": SCORES,
        "policy": POLICY,
        "heldout": HELDOUT,
        "comparisons": COMPARISONS,
    }
    return {rung["name"]: rung for rung in ladder(1, **(found | changes))}


def test_the_chain_in_its_order() -> None:
    found = rungs()
    assert list(found) == [
        "fit to later likes", "shuffle drop", "spread", "carry-over", "DPO accuracy", "held-out reward", "reading gain",
        "reading gain in NDCG@5", "style gain", "test users, PRM against base-llm",
    ]  # fmt: skip
    assert {rung["verdict"] for rung in found.values()} == {HOLDS}
    assert first_broken(list(found.values())) is None
    assert found["style gain"]["value"] == pytest.approx(-0.04) and "less than" in found["style gain"]["says"]


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.01, 0.1, HOLDS), (-0.01, 0.1, NOT_SHOWN), (-0.2, -0.1, FAILS)]
)
def test_the_verdict_is_the_intervals(low: float, high: float, verdict: str) -> None:
    drop = {"shuffle_drop": (low + high) / 2, "shuffle_drop_ci95": [low, high]}
    assert rungs(reward=drop)["shuffle drop"]["verdict"] == verdict


def test_a_single_user_has_no_interval_and_shows_nothing() -> None:
    """NaN, or null once it was in a manifest."""
    for none in (float("nan"), None):
        rung = rungs(reward={"shuffle_drop": 0.1, "shuffle_drop_ci95": [none, none]})["shuffle drop"]
        assert rung["ci95"] is None and rung["verdict"] == NOT_SHOWN


def test_dpo_accuracy_is_set_beside_a_half_and_split_by_kind() -> None:
    """66 of 108 is above chance, 60 of 108 is not shown to be (Wilson)."""
    policy = {
        "accuracy": 60 / 108,
        "heldout_accuracy_own": 66 / 108,
        "heldout_accuracy_other": None,
        "rows": {"valid": 108, "valid_own": 108, "valid_other": 0},
    }
    found = rungs(policy=policy)
    assert found["DPO accuracy"]["verdict"] == NOT_SHOWN and found["DPO accuracy"]["bound"] == 0.5
    assert found["DPO accuracy, own texts"]["verdict"] == HOLDS
    assert "DPO accuracy, other users' texts" not in found


def test_a_gain_that_is_mostly_manner_fails_the_style_rung() -> None:
    """The reward rises by .1: .15 for anybody's text, and reading falls by .05."""
    figures = {"reward": figure(0.0, 0.1), "reading": figure(0.1, 0.05), "others_reward": figure(-0.1, 0.05)}
    found = rungs(heldout={"figures": figures})
    assert (found["held-out reward"]["verdict"], found["reading gain"]["verdict"]) == (HOLDS, FAILS)
    assert found["style gain"]["verdict"] == FAILS and "more than" in found["style gain"]["says"]
    assert first_broken(list(found.values()))["name"] == "reading gain"  # type: ignore[index]


def test_rewards_that_tie_and_lists_that_cannot_be_halved() -> None:
    scores = {"spread": 0.1, "gap_held_out": None, "best tied": 0.6}
    found = rungs(scores=scores)
    assert found["spread"]["verdict"] == FAILS and "60.0%" in found["spread"]["says"]
    assert "carry-over" not in found


def test_what_is_known_of_the_truth_and_of_an_oracle_comes_first() -> None:
    facet = {"accuracy": 0.5, "chance": 0.25, "corrected": 0.33, "corrected_ci95": [0.2, 0.4]}
    sides = {f"accuracy_by_facet_{side}": {"all": facet, "genre": facet} for side in ("before", "after")}
    gains = {"statistics": gain(0.005, 0.001), "random": gain(0.0, 0.001), "oracle": gain(0.02, 0.012)}
    found = rungs(heldout=HELDOUT | sides, reward=REWARD | {"channel": gains})
    assert list(found)[:4] == ["text accuracy", "fit to later likes", "channel", "shuffle drop"]
    assert found["text accuracy"]["value"] == 0.33 and "genre 0.33 -> 0.33" in found["text accuracy"]["says"]
    channel = found["channel"]
    assert channel["value"] == 0.02 and channel["ci95"] == pytest.approx([-0.00352, 0.04352])
    assert channel["verdict"] == NOT_SHOWN and channel["says"].endswith("others: statistics +0.0050")


def test_without_an_oracle_the_channel_is_that_of_counted_texts() -> None:
    gains = {"vllm": gain(0.001, 0.001), "statistics": gain(0.005, 0.001), "random": gain(0.0, 0.001)}
    channel = rungs(reward=REWARD | {"channel": gains})["channel"]
    assert channel["ci95"] == pytest.approx([0.00304, 0.00696]) and channel["verdict"] == HOLDS
    assert "counted from the history" in channel["says"] and channel["says"].endswith("others: vllm +0.0010")
    alone = rungs(reward=REWARD | {"channel": {"statistics": gain(0.005, 0.001)}})["channel"]
    assert alone["says"].endswith("others: none")
    for nothing in ({}, {"vllm": gain(0.1, 0.01)}):
        assert "channel" not in rungs(reward=REWARD | {"channel": nothing})


def test_the_terminal_says_where_to_look_first() -> None:
    text = printed(list(rungs(reward={"shuffle_drop": 0.0, "shuffle_drop_ci95": [-0.01, 0.01]}).values()))
    assert "shuffle drop                                    +0.0000 [-0.0100, +0.0100]   not shown" in text
    assert text.endswith("look first at: shuffle drop") and max(map(len, text.splitlines())) <= 110
    assert "look first" not in printed(list(rungs().values()))


def test_pairs_that_the_accuracy_is_not_of_do_not_narrow_its_interval() -> None:
    """Own texts alone are trained on, and the accuracy that chose the policy is theirs."""
    rows = {"valid": 200, "valid_own": 100, "valid_other": 100, "train_own": 400, "train_other": 0}
    found = rungs(
        policy={"accuracy": 0.58, "heldout_accuracy_own": 0.58, "heldout_accuracy_other": 0.9, "rows": rows}
    )
    assert found["DPO accuracy"]["ci95"] == found["DPO accuracy, own texts"]["ci95"]
    assert found["DPO accuracy"]["verdict"] == NOT_SHOWN and "of 100 users" in found["DPO accuracy"]["says"]


def test_a_users_pairs_count_as_one() -> None:
    """Three pairs of each of 50 users are not 150 answers, and pairs of two kinds of the same users not twice as many."""
    rows = {"valid": 200, "valid_own": 150, "valid_other": 50, "valid_own_users": 50, "valid_other_users": 50}
    assert judged_users(rows) == judged_users(rows, "own") == judged_users(rows, "other") == 50
    found = rungs(policy={"accuracy": 0.6, "heldout_accuracy_own": 0.6, "rows": rows})
    assert found["DPO accuracy, own texts"]["verdict"] == NOT_SHOWN  # 90 of 150 would be above chance
    by_kind = {"valid_own_users": 100, "valid_other_users": 25, "train_own": 300, "train_other": 300}
    assert judged_users(by_kind) == 44  # standard errors of 1/10 and 1/5: the mean, .15, is that of 44.4


def test_runs_of_older_versions_know_fewer_counts() -> None:
    assert judged_users({"valid_own": 5, "valid_other": 5}) == 5 and judged_users({"valid": 7}) == 7
    assert judged_users({}) == 0 and judged_users({"valid": 7}, "own") == 0


def test_the_channel_names_its_metric() -> None:
    channel = {"channel": {"statistics": gain(0.03, 0.01)}}
    assert rungs(reward=REWARD | channel)["channel"]["says"].startswith("NDCG@5 that a text adds")
    other = rungs(reward=REWARD | channel | {"channel_metric": "map@5"})
    assert other["channel"]["says"].startswith("MAP@5 that a text adds")
