"""The verdict on constructed runs: each has one thing that is wrong, or nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dpo4rec_ray.config import default_config
from dpo4rec_ray.evaluation import verdict as rule
from dpo4rec_ray.evaluation.ladder import ladder
from dpo4rec_ray.evaluation.verdict import ADVICE, verdict

Stats = dict[str, Any]


def difference(system: str, against: str, delta: float, spread: float, backbone: str = "prm") -> Stats:
    found = {"backbone": backbone, "system": system, "against": against, "metric": "ndcg@5"}
    return {**found, "delta": delta, "ci95": [delta - spread, delta + spread]}


def figure(before: float, after: float, spread: float = 0.01) -> Stats:
    found: Stats = {}
    for name, value in (("before", before), ("after", after), ("change", after - before)):
        found |= {name: value, f"{name}_ci95": [value - spread, value + spread]}
    return found


def constructed(
    *,
    texts: float = 0.05,
    trained: float = 0.03,
    shuffle: float = 0.09,
    gap: float = 0.2,
    tied: float = 0.1,
    distinct: float = 0.9,
    overall: float = 0.9,
    reward: float = 0.1,
    used: int = 3,
) -> Stats:
    """A run of one round in which everything works; the arguments break it. Intervals are .01 to each side."""
    comparisons = [
        difference("base-llm", "backbone", 0.02, 0.01),
        difference("dpo4rec-round1", "backbone", texts, 0.01),
        difference("dpo4rec-round1", "base-llm", trained, 0.01),
        difference("dpo4rec-round1", "statistics", trained, 0.01),
    ]
    heldout = {
        "figures": {
            "reward": figure(-2.2, -2.2 + reward),
            "reading": figure(0.2, 0.2 + reward),
            "reading_ndcg": figure(0.1, 0.1 + reward),
            "others_reward": figure(-2.4, -2.4),
            "distinct_texts": figure(0.9, distinct),
        }
    }
    scores = {"spread": 0.2, "best tied": tied, "carried": 0.4}
    scores |= {"gap_held_out": gap, "gap_held_out_ci95": [gap - 0.1, gap + 0.1]}
    row = {
        "round": 1,
        "training": {"objective": "dpo"},
        "figures": heldout["figures"],
        "diagnosis": {"distinct_overall_before": 0.9, "distinct_overall_after": overall},
        "ladder": ladder(
            1,
            {"shuffle_drop": shuffle, "shuffle_drop_ci95": [shuffle - 0.02, shuffle + 0.02]},
            scores,
            {"accuracy": 0.75, "rows": {"valid": 100}},
            heldout,
            comparisons,
        ),
    }
    return {
        "generator": "vllm",
        "best_round": 1,
        "rounds": [row],
        "comparisons": comparisons,
        "prepare": {"splits": {"users/test": 100}},
        "use_of_texts": [{"system": "dpo4rec-round1", "backbone": "prm", "fits": 3, "used": used}],
    }


@pytest.mark.parametrize(
    ("changes", "texts", "training", "weak", "advised"),
    [
        ({}, rule.HELPS, rule.HELPS, "", rule.CONFIRM),
        (
            {"texts": -0.05, "trained": -0.07},
            rule.HARMS,
            rule.HARMS,
            "test users, PRM against backbone",
            rule.HARMS,
        ),
        (
            {"texts": 0.005, "trained": 0.005},
            rule.NOTHING,
            rule.NOTHING,
            "test users, PRM against backbone",
            rule.TEST,
        ),
        ({"gap": 0.05, "trained": 0.0}, rule.HELPS, rule.NOTHING, rule.NOISE, rule.NOISE),
        ({"tied": 0.6, "trained": 0.0}, rule.HELPS, rule.NOTHING, rule.NOISE, rule.NOISE),
        (
            {"shuffle": 0.01, "texts": 0.0, "trained": 0.0},
            rule.NOTHING,
            rule.NOTHING,
            rule.UNREAD,
            rule.UNREAD,
        ),
        ({"used": 0, "texts": 0.0, "trained": 0.0}, rule.NOTHING, rule.NOTHING, rule.UNREAD, rule.UNREAD),
        ({"distinct": 0.2, "trained": -0.05}, rule.HELPS, rule.HARMS, rule.COLLAPSE, rule.COLLAPSE),
        ({"overall": 0.1, "trained": -0.05}, rule.HELPS, rule.HARMS, rule.COLLAPSE, rule.COLLAPSE),
        ({"reward": 0.005, "trained": 0.0}, rule.HELPS, rule.NOTHING, "held-out reward", "held-out reward"),
    ],
    ids=[
        "helps",
        "harms",
        "nothing",
        "noise",
        "ties",
        "unread",
        "unused",
        "collapse",
        "collapse-overall",
        "not-learned",
    ],
)
def test_a_constructed_run_gets_its_verdict(
    changes: Stats, texts: str, training: str, weak: str, advised: str
) -> None:
    found = verdict(constructed(**changes))
    assert (found.texts, found.training, found.weak) == (texts, training, weak)
    advice, page = ADVICE[advised]
    assert found.next_step.lower().startswith(advice.lower()) and found.see == page


def test_the_headline_says_both_with_intervals_and_names_the_weak_rung() -> None:
    assert verdict(constructed(gap=0.05, trained=0.0)).headline == (
        "Texts help PRM by +0.0500 NDCG@5 [+0.0400, +0.0600]. DPO adds nothing measurable to PRM (+0.0000 NDCG@5 "
        "[-0.0100, +0.0100]). The weak rung: the reward does not carry over to other lists of the same user."
    )
    assert verdict(constructed()).headline.endswith("DPO helps PRM by +0.0300 NDCG@5 [+0.0200, +0.0400].")


def test_texts_that_do_not_beat_counted_ones_are_said_to() -> None:
    run = constructed()
    counted = next(row for row in run["comparisons"] if row["against"] == "statistics")
    counted |= {"delta": 0.0, "ci95": [-0.01, 0.01]}
    run["rounds"][0]["ladder"] = ladder(1, {}, {}, {}, {}, run["comparisons"])
    found = verdict(run)
    assert found.weak == "test users, PRM against statistics" and found.next_step.startswith(
        "The LLM is not shown"
    )
    assert not any("counted" in one for one in found.sentences)  # the claims have it
    counted |= {"delta": 0.02, "ci95": [0.01, 0.03]}
    run["rounds"][0]["ladder"] = []
    assert any(
        "PRM with these texts is better than with texts counted" in one for one in verdict(run).sentences
    )


def test_a_mean_over_users_that_says_something_else_is_told() -> None:
    run = constructed(texts=0.005, trained=0.005)
    assert not any("every user counted once" in one for one in verdict(run).sentences)
    for row in run["comparisons"]:
        row |= {"by user delta": 0.02, "by user ci95": [0.01, 0.03]}
    told = [one for one in verdict(run).sentences if "every user counted once" in one]
    assert len(told) == 1 and "+0.0200 NDCG@5 [+0.0100, +0.0300] for PRM (texts, DPO)" in told[0]


def test_first_texts_that_no_reranker_uses_explain_equal_differences() -> None:
    run = constructed()
    base = {"system": "base-llm", "backbone": "prm", "used": 0, "fits": 3}
    assert not any("ranks as the backbone" in one for one in verdict(run).sentences)
    run["use_of_texts"] = [*run.get("use_of_texts", []), base]
    assert any("base-llm ranks as the backbone" in one for one in verdict(run).sentences)


def test_levels_have_no_sign() -> None:
    run = constructed()
    accuracy = ladder(1, {}, {}, {"accuracy": 0.5267, "rows": {"valid": 150}}, {}, [])
    run["rounds"][0]["ladder"] = accuracy
    assert verdict(run).headline.endswith("DPO accuracy, 0.527 [0.447, 0.605], is not shown to be above 0.5.")


def test_any_rung_that_fails_has_its_advice() -> None:
    run = constructed()
    facets = {"all": {"accuracy": 0.2, "chance": 0.2, "corrected": 0.0, "corrected_ci95": [-0.1, 0.1]}}
    heldout = {"figures": run["rounds"][0]["figures"] | {"fit_above": figure(0.0, 0.0)}}
    heldout |= {"accuracy_by_facet_before": facets, "accuracy_by_facet_after": facets}
    policy = {"accuracy": 0.5, "heldout_accuracy_own": 0.5, "rows": {"valid": 9, "valid_own": 9}}
    reward = {"channel": {"statistics": {"gain": 0.0, "std_error": 0.1}}}
    rungs = ladder(1, reward, {}, policy, heldout, run["comparisons"])
    assert len(rungs) == 12
    for rung in rungs:
        run["rounds"][0]["ladder"] = [rung | {"verdict": "fails"}]
        found = verdict(run)
        assert found.weak == rung["name"] and found.next_step


def test_a_rung_without_an_interval_decides_nothing() -> None:
    run = constructed()
    run["rounds"][0]["ladder"][0] |= {"verdict": "not shown", "ci95": None}
    assert verdict(run).weak == ""


def test_an_early_cause_is_named_before_what_follows_from_it() -> None:
    found = verdict(constructed(shuffle=0.0, gap=0.0, distinct=0.1, used=0, reward=0.0))
    assert found.weak == rule.UNREAD


def test_backbones_that_differ_are_all_named() -> None:
    run = constructed()
    run["comparisons"] += [
        difference("dpo4rec-round1", "backbone", -0.03, 0.01, "dlcm"),
        difference("dpo4rec-round1", "backbone", 0.0, 0.01, "mir"),
    ]
    found = verdict(run)
    assert found.texts == rule.MIXED
    for part in ("help PRM by +0.0500", "harm DLCM by -0.0300", "nothing measurable to MIR (+0.0000"):
        assert part in found.headline


def test_a_difference_that_is_too_small_to_show_says_how_many_users_would_show_it() -> None:
    step = verdict(constructed(texts=0.005, trained=0.005)).next_step
    assert "with 100 the interval is 0.0100" in step and step.endswith("would show with about 400.")


def test_a_gain_without_a_rise_of_the_held_out_reward_may_be_luck() -> None:
    lucky = verdict(constructed(reward=0.0))
    assert any("may be luck" in one for one in lucky.sentences)
    assert not any("may be luck" in one for one in verdict(constructed()).sentences)


def test_a_run_without_rounds_is_judged_by_its_texts_alone() -> None:
    run = {
        "generator": "statistics",
        "best_round": 0,
        "rounds": [],
        "comparisons": [difference("statistics", "backbone", 0.004, 0.003)],
    }
    found = verdict(run)
    assert (found.texts, found.training, found.weak) == (rule.HELPS, rule.UNKNOWN, "")
    assert found.headline == "Texts help PRM by +0.0040 NDCG@5 [+0.0010, +0.0070]."


def test_without_any_kept_round_the_last_is_judged_and_the_first_texts_are_served() -> None:
    run = constructed() | {"best_round": 0}
    found = verdict(run)
    assert "Texts help PRM by +0.0200" in found.headline and found.training == rule.HELPS
    assert any("None of 1 round is better" in one for one in found.sentences)


def test_a_single_test_user_has_no_interval_and_shows_nothing() -> None:
    run = {
        "rounds": [],
        "comparisons": [difference("base-llm", "backbone", 0.1, 0.0) | {"ci95": [None, None]}],
    }
    assert verdict(run).texts == rule.NOTHING


def test_every_key_in_the_advice_is_one_of_the_recipe() -> None:
    known = {
        f"{section}.{key}" for section, values in default_config().model_dump().items() for key in values
    }
    named = set(re.findall(r"\b[a-z_]+\.[a-z_]+\b", " ".join(text for text, _ in ADVICE.values())))
    assert len(named) > 15 and named <= known, named - known


def test_a_gain_of_two_rounds_is_set_beside_what_both_changed() -> None:
    """Round 2 alone did not clearly raise the held-out reward; both together did, and the test users are compared with none."""
    found = constructed()
    (first,) = found["rounds"]
    own = {**first["figures"], "reward": figure(-2.1, -2.085, 0.03), "reading": figure(0.3, 0.31, 0.03)}
    second = {**first, "round": 2, "figures": own, "figures_since_base": first["figures"]}
    found |= {"best_round": 2, "rounds": [first, second]}
    for row in found["comparisons"]:
        row["system"] = row["system"].replace("round1", "round2")
    said = verdict(found)
    assert (said.training, said.weak) == (rule.HELPS, "")
    assert not any("luck" in sentence for sentence in said.sentences)
    assert any("the reward changes by +0.1000" in sentence for sentence in said.sentences)


def test_users_that_were_tested_are_counted_not_those_of_the_split() -> None:
    """With a cut in time both have test lists."""
    found = constructed(texts=0.005, trained=0.005)
    assert "with 100 the interval" in verdict(found).next_step
    assert "with 40 the interval" in verdict({**found, "test_users": 40}).next_step


def test_a_single_user_has_no_interval_and_shows_no_collapse() -> None:
    found = constructed(distinct=0.2)
    found["rounds"][0]["figures"]["distinct_texts"]["change_ci95"] = [None, None]
    assert verdict(found).weak != rule.COLLAPSE


def test_reading_that_the_ranking_does_not_show_is_not_called_a_manner() -> None:
    found = constructed()
    for rung in found["rounds"][0]["ladder"]:
        if rung["name"] == "reading gain in NDCG@5":
            rung["verdict"] = "not shown"
    said = verdict(found)
    assert said.weak == said.advised == "reading gain in NDCG@5"
    assert "manner" not in said.next_step and "data.max_users" in said.next_step
