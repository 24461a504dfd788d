"""Each sign of trouble is told once, and a quiet training says nothing."""

from __future__ import annotations

from dpo4rec_ray.core.text_watch import TextWatch

QUIET = {"kl_per_token": 0.01, "clip_share": 0.02, "surprise": 2.0}


def told(*steps: dict[str, float]) -> list[str]:
    watch = TextWatch(len(steps), max_kl_per_token=0.5)
    return [line for step, metrics in enumerate(steps, start=1) for line in watch.see(step, metrics)]


def test_a_quiet_training_says_nothing() -> None:
    assert told(*[QUIET] * 40) == []
    assert told(*[{"loss": 1.0}] * 40) == []  # best-of-N has none of these figures


def test_a_policy_that_is_far_from_its_reference_is_told_once() -> None:
    [line] = told(*[QUIET] * 5, *[QUIET | {"kl_per_token": 0.7}] * 9)
    assert line.startswith("step 8 of 14:") and "0.7 nats per token" in line


def test_clipped_tokens_are_told() -> None:
    [line] = told(*[QUIET | {"clip_share": 0.4}] * 9)
    assert "40% of the tokens are clipped" in line


def test_a_collapse_is_told() -> None:
    [line] = told(*[QUIET] * 5, *[QUIET | {"surprise": 0.5}] * 9)
    assert "rose from -2 to" in line


def test_a_single_wild_step_is_no_trouble() -> None:
    assert told(*[QUIET] * 5, QUIET | {"kl_per_token": 90.0}, *[QUIET] * 5) == []
