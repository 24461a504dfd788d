"""What is said of a round that is no better: each sign alone, and none."""

from __future__ import annotations

import re

import pytest

from dpo4rec_ray.core.intervals import Interval
from dpo4rec_ray.core.reading_gain import Verdict
from dpo4rec_ray.evaluation.round_reasons import reasons

WORSE = Verdict(False, Interval(-0.02, -0.05, 0.01, 0.2), Interval(0.0, -0.01, 0.01, 1.0))


def figure(before: float, after: float, low: float = -1.0) -> dict:
    return {"before": before, "after": after, "change": after - before, "change_ci95": [low, 1.0]}


def heldout(**figures: dict) -> dict:
    usual = {
        "words": figure(60, 62),
        "common_opening": figure(0.3, 0.4),
        "others_reward": figure(0, 0.1),
        "reading": figure(0, 0.1),
    }
    return {"figures": usual | figures, "distinct_texts_before": 0.9, "distinct_texts_after": 0.8}


POLICY = {"kl_per_token": 0.1, "accuracy": 0.7, "rows": {"valid": 200}}
SCORES = {"gap_held_out_ci95": [0.02, 0.09], "carried": 0.4}


def why(
    heldout_stats: dict | None = None, policy: dict | None = None, scores: dict | None = None
) -> list[str]:
    return reasons(
        WORSE,
        heldout_stats or heldout(),
        POLICY | (policy or {}),
        SCORES | (scores or {}),
        max_kl_per_token=0.5,
    )


def test_what_decided_comes_first_and_no_cause_is_made_up() -> None:
    first, second = why()
    assert first == "the held-out reward is not higher: -0.0200 [-0.0500, +0.0100]"
    assert second.endswith("points to a cause: it may be as good as the one before")
    read_less = Verdict(False, Interval(0.1, 0.05, 0.15, 0.0), Interval(-0.03, -0.05, -0.01, 0.0))
    found = reasons(read_less, heldout(), POLICY, SCORES, 0.5)
    assert found[0] == "its texts say less about their users: reading -0.0300 [-0.0500, -0.0100]"
    assert found[1].endswith("read its pairs and texts (report.html)")


@pytest.mark.parametrize(
    ("stats", "policy", "scores", "words"),
    [
        (
            heldout(),
            {"kl_per_token": 0.8},
            {},
            "0.8 nats per token from its reference, above the bound of 0.5",
        ),
        (heldout(), {"accuracy": 0.52}, {}, "not told apart .accuracy 0.52, 200 users"),
        (heldout(words=figure(60, 130)), {}, {}, "much longer: 60 -> 130 words"),
        (heldout(words=figure(60, 20)), {}, {}, "much shorter: 60 -> 20 words"),
        (heldout(common_opening=figure(0.3, 0.9)), {}, {}, "begin alike: 30% -> 90%"),
        (heldout() | {"distinct_texts_after": 0.2}, {}, {}, "vary less: 90% -> 20%"),
        (
            heldout(others_reward=figure(0, 0.1, low=0.05), reading=figure(0, -0.01)),
            {},
            {},
            "learned a manner: .* rose by 0.1000",
        ),
        (heldout(), {}, {"gap_held_out_ci95": [-0.02, 0.09]}, "do not carry over .* .40% of the gap"),
    ],
)
def test_each_sign_alone(stats: dict, policy: dict, scores: dict, words: str) -> None:

    _, sign = why(stats, policy, scores)
    assert re.search(words, sign), sign


def test_what_is_not_known_is_no_sign() -> None:
    """A training without pairs, one user, no lists to carry over to."""
    bare = {"figures": {}}
    found = reasons(
        WORSE, bare, {"kl_per_token": None}, {"gap_held_out_ci95": [None, None], "carried": None}, 0.5
    )
    assert len(found) == 2 and "no figure" in found[1]
    (_, sign) = why(scores={"gap_held_out_ci95": [0.0, 0.0], "carried": None})
    assert "do not carry over to a user's other lists: it learned from noise" in sign


@pytest.mark.parametrize(
    ("objective", "pull"),
    [
        ("dpo", "raise dpo.beta, or lower"),
        ("grpo", "raise grpo.kl_weight, or lower"),
        ("best_of_n", ": lower policy.lr"),
    ],
)
def test_what_pulls_to_the_reference_is_the_learners(objective: str, pull: str) -> None:
    (_, sign) = why(policy={"kl_per_token": 0.8, "objective": objective})
    assert pull in sign
