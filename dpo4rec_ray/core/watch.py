"""Watches the metrics of a DPO training for signs of trouble, and warns of each kind once.

A loss that is not finite is an error of the trainer, not a warning.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean, median, variance

# Metrics of one step are means over a few pairs. A window is a twentieth of the training, so that long trainings with small
# batches are not judged by a few pairs; and at least five steps, because fewer say too little.
WINDOWS_PER_TRAINING = 20
MIN_WINDOW = 5  # steps
# Real preferences contradict each other: held-out accuracies of .6 to .8 are usual. A model that has all pairs right before
# the learning rate has warmed up has learned some mark of one side. Under 50 steps, a tenth is too short to tell.
EARLY = 0.1  # of the training
ALL_RIGHT = 1.0 - 1e-6  # a mean over ranks of ones need not be one to the last digit
# The fall must exceed noise. About 18 windows are compared with the first one; in a short training each comparison has
# 5 + 5 steps, where chance gives a difference of four standard errors twice in a thousand.
FALL_ERRORS = 4.0
# When a rejected text becomes less likely, a similar chosen text does so too, a little. From a fifth of that fall on, a good
# part of the lost probability goes to texts that are in no pair at all.
FALL_SHARE = 0.2
# With lengths that vary by a third, the ratio of 80 pairs' means (5 steps of 16) has a standard error of .05.
LONGER = 1.2


class Watch:
    """Warnings for one training of `num_steps` optimiser steps. After a resume it needs to see the earlier steps again."""

    def __init__(self, num_steps: int, max_kl_per_token: float):
        """max_kl_per_token: in nats; no warning while the trainer's estimate of KL(reference || policy) is below it."""
        self._num_steps, self._max_kl = num_steps, max_kl_per_token
        self._window = max(MIN_WINDOW, num_steps // WINDOWS_PER_TRAINING)
        self._accuracy = deque[float](maxlen=self._window)
        self._kl = deque[float](maxlen=MIN_WINDOW)
        self._chosen: list[float] = []  # rewards
        self._rejected: list[float] = []
        self._lengths, self._seen = [0.0, 0.0], 0  # sums over steps of chosen, rejected
        self._said: set[str] = set()

    def see(self, step: int, metrics: dict[str, float]) -> list[str]:
        """Take the metrics of optimiser step `step`, counted from 1.

        metrics: means over the step's pairs of accuracy, chosen_reward, rejected_reward (beta times log-ratio),
            chosen_length, rejected_length (tokens) and kl_per_token (nats); others are not read.

        Returns:
            New warnings, one line each; no warning comes twice in a training.
        """
        self._seen += 1
        self._accuracy.append(metrics["accuracy"])
        kl = metrics["kl_per_token"]
        self._kl.append(math.inf if math.isnan(kl) else kl)  # not a number counts as far away
        self._chosen.append(metrics["chosen_reward"])
        self._rejected.append(metrics["rejected_reward"])
        for side, name in enumerate(("chosen_length", "rejected_length")):
            self._lengths[side] += metrics[name]
        found = {
            "accuracy": self._too_easy(step),
            "displacement": self._displacement(),
            "length": self._longer(),
            "kl": self._far(),
        }
        new = {name: text for name, text in found.items() if text and name not in self._said}
        self._said.update(new)
        return [f"step {step} of {self._num_steps}: {text}" for text in new.values()]

    def _too_easy(self, step: int) -> str:
        if step > EARLY * self._num_steps or len(self._accuracy) < self._window:
            return ""
        if min(self._accuracy) < ALL_RIGHT:
            return ""
        return (
            f"every pair of the last {self._window} steps is told apart (accuracy 1.0) in the first tenth of training: "
            "the two sides may differ by a mark (a phrase, a format, cut-off texts) rather than by preference; "
            "read some pairs, and train for fewer epochs or with a lower learning rate"
        )

    def _displacement(self) -> str:
        """Likelihood displacement (Razin et al., arXiv 2410.08847; Pal et al., arXiv 2402.13228)."""
        size = self._window
        if self._seen < 3 * size or self._seen % size:
            return ""
        fall, rejected_fall = _fall(self._chosen, size), _fall(self._rejected, size)
        if not (fall and rejected_fall) or fall < FALL_SHARE * rejected_fall:
            return ""
        return (
            f"the chosen reward falls with the rejected one, by {fall:.3g} and {rejected_fall:.3g} from the first to the "
            f"last {size} steps: both texts become less likely (likelihood displacement); set nll_weight, or raise beta"
        )

    def _longer(self) -> str:
        chosen, rejected = (total / self._seen for total in self._lengths)
        if self._seen < self._window or chosen <= LONGER * rejected:
            return ""
        return (
            f"chosen texts are longer than rejected ones, {chosen:.0f} to {rejected:.0f} tokens on average of all pairs "
            'so far: the LLM is being taught to write longer; loss = "sigmoid_norm" compares means over tokens'
        )

    def _far(self) -> str:
        # the median: a single token with an extreme ratio can lift one step's mean
        if len(self._kl) < MIN_WINDOW or median(self._kl) <= self._max_kl:
            return ""
        return (
            f"the policy is {median(self._kl):.3g} nats per token from the reference (median of the last "
            f"{MIN_WINDOW} steps), above the bound of {self._max_kl:g}: its texts may degrade; "
            "raise beta, or lower the learning rate or the epochs"
        )


def _fall(rewards: list[float], size: int) -> float:
    """How far the mean of the last `size` values is below that of the first; 0 where noise or an earlier dip explains it."""
    start, middle, end = rewards[:size], rewards[size:-size], rewards[-size:]
    fall = fmean(start) - fmean(end)
    error = math.sqrt((variance(start) + variance(end)) / size)
    return fall if fall > FALL_ERRORS * error and fmean(end) < fmean(middle) else 0.0
