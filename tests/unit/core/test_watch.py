from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest

from dpo4rec_ray.core.watch import Watch

STEPS = 200  # windows of 10 steps, a tenth of 20
Series = Callable[[int], float]
# What a good training looks like: chosen up, rejected down, four of five pairs right in the end, equal lengths.
HEALTHY: dict[str, Series] = {
    "accuracy": lambda step: min(0.8, 0.5 + step / 100),
    "chosen_reward": lambda step: 0.5 * step / STEPS,
    "rejected_reward": lambda step: -1.0 * step / STEPS,
    "chosen_length": lambda step: 110.0,
    "rejected_length": lambda step: 100.0,
    "kl_per_token": lambda step: 0.1 * step / STEPS,
    "loss": lambda step: math.log(2) - 0.2 * step / STEPS,
}


def ripple(step: int) -> float:
    """Noise that is the same every time: -.15 to .15, period 7."""
    return 0.05 * (step * 3 % 7 - 3)


def train(num_steps: int = STEPS, **series: Series) -> list[str]:
    watch = Watch(num_steps, max_kl_per_token=0.5)
    found: list[str] = []
    for step in range(1, num_steps + 1):
        figures = {name: value(step) for name, value in (HEALTHY | series).items()}
        figures["chosen_reward"] += ripple(step)
        figures["rejected_reward"] += ripple(step)
        found += watch.see(step, figures)
    return found


@pytest.mark.parametrize("num_steps", [1, 4, 30, 200, 1000])
def test_a_healthy_training_is_silent(num_steps: int) -> None:
    assert train(num_steps) == []


WARNED: dict[str, tuple[dict[str, Series], str]] = {
    # 20 steps are the first tenth, the last 10 of them all right
    "accuracy": ({"accuracy": lambda step: float(step > 10)}, "step 20 of 200: .*accuracy 1.0"),
    # a first window, one to compare with it, and one between
    "displacement": (
        {
            "chosen_reward": lambda step: -2.0 * step / STEPS,
            "rejected_reward": lambda step: -4.0 * step / STEPS,
        },
        "step 30 of 200: .*likelihood displacement.*nll_weight.*beta",
    ),
    "lengths": ({"chosen_length": lambda step: 125.0}, "step 10 of 200: .*125 to 100 tokens.*sigmoid_norm"),
    # from step 50 on the bound is passed: 3 of the last 5 steps are above at step 52
    "kl": (
        {"kl_per_token": lambda step: 0.6 if step >= 50 else 0.1},
        "step 52 of 200: .*0.6 nats.*bound of 0.5",
    ),
    "kl not finite": (
        {"kl_per_token": lambda step: math.nan if step > 9 else 0.1},
        "step 12 of 200: .*inf nats",
    ),
}


@pytest.mark.parametrize("name", WARNED)
def test_each_warning_comes_once_and_alone(name: str) -> None:
    series, expected = WARNED[name]
    found = train(**series)
    assert len(found) == 1, found
    assert re.match(expected, found[0]), found[0]
    assert "\n" not in found[0]


QUIET: dict[str, dict[str, Series]] = {
    "all right, but late": {"accuracy": lambda step: float(step > 15)},
    "two wrong pairs among the early ones": {"accuracy": lambda step: 15 / 16 if step in (10, 15) else 1.0},
    "only the rejected reward falls": {"chosen_reward": lambda step: 0.0},
    "only the chosen reward falls": {
        "chosen_reward": lambda step: -1.0 * step / STEPS,
        "rejected_reward": lambda step: 0.5,
    },
    "a fall that has ended": {
        "chosen_reward": lambda step: -3.0 if 11 <= step <= 20 else -0.5 * (step > 20),
        "rejected_reward": lambda step: -3.0 if 11 <= step <= 20 else -0.6 * (step > 20),
    },
    "a fall within the noise": {
        "chosen_reward": lambda step: -0.1 * step / STEPS,
        "rejected_reward": lambda step: -0.2 * step / STEPS,
    },
    "a tenth of the rejected one's fall": {
        "chosen_reward": lambda step: -1.0 * step / STEPS,
        "rejected_reward": lambda step: -10.0 * step / STEPS,
    },
    "one long batch": {"chosen_length": lambda step: 900.0 if step == 100 else 100.0},
    "one extreme token": {"kl_per_token": lambda step: 1e6 if step % 50 == 0 else 0.1},
}


@pytest.mark.parametrize("name", QUIET)
def test_what_only_looks_like_it_is_silent(name: str) -> None:
    assert train(**QUIET[name]) == []


def test_several_findings_of_one_step() -> None:
    """Lengths of 90 for 50 steps and 200 from then on pass 1.2 times 100 at step 69: (50 * 90 + 19 * 200) / 69 = 120.3."""
    found = train(
        chosen_length=lambda step: 200.0 if step > 50 else 90.0,
        kl_per_token=lambda step: float(step >= 67),
    )
    assert [text.split(":")[0] for text in found] == ["step 69 of 200"] * 2


def test_shown_its_past_again_it_goes_on_as_if_never_stopped() -> None:
    """A worker that restarts at step 40 reads the first 39 steps from metrics.jsonl and drops what was said of them."""
    series = HEALTHY | {"kl_per_token": lambda step: 0.9, "accuracy": lambda step: 1.0}
    steps = [(step, {name: value(step) for name, value in series.items()}) for step in range(1, STEPS + 1)]
    watch = Watch(STEPS, max_kl_per_token=0.5)
    whole = [text for step in steps for text in watch.see(*step)]
    assert [text.split(":")[0] for text in whole] == ["step 5 of 200", "step 10 of 200"]
    resumed = Watch(STEPS, max_kl_per_token=0.5)
    for step in steps[:39]:
        resumed.see(*step)
    assert [text for step in steps[39:] for text in resumed.see(*step)] == []
