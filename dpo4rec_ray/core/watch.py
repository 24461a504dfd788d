"""Watches the figures of a DPO training for what a practitioner would stop and look at. Says each thing once.

A loss that is not finite is an error of the trainer, not a warning.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean, median, variance

Figures = dict[str, float]

# Figures of one step are means over a few pairs. A window is a twentieth of the training, so that long trainings with
# small batches are not judged by a handful of pairs; and never under five steps, below which chance decides.
WINDOWS_PER_TRAINING = 20
MIN_WINDOW = 5  # steps
# Real preferences disagree with one another: held-out accuracies of .6 to .8 are usual, and who has all pairs right before
# the learning rate has warmed up has learned a mark that only one side carries. Under 50 steps, a tenth is too few to say.
EARLY = 0.1  # of the training
ALL_RIGHT = 1.0 - 1e-6  # a mean over ranks of ones need not be one to the last digit
# The fall must be clear of noise: some 18 windows are compared with the first one, by 5 + 5 steps in a short training,
# where a difference of four standard errors comes about by chance twice in a thousand.
FALL_ERRORS = 4.0
# A rejected reward may drag a similar chosen text along a little. From a fifth of its fall on, a good part of the lost
# probability goes to texts that are in neither half of any pair.
FALL_SHARE = 0.2
# With lengths that vary by a third, the ratio of 80 pairs' means (5 steps of 16) has a standard error of .05.
LONGER = 1.2


class Watch:
    """Warnings of one training of `num_steps` optimiser steps. After a resume, show it the earlier steps again."""

    def __init__(self, num_steps: int, max_kl_per_token: float):
        """max_kl_per_token: nats; the trainer's estimate of KL(reference || policy) may stay below it."""
        self._num_steps, self._max_kl = num_steps, max_kl_per_token
        self._window = max(MIN_WINDOW, num_steps // WINDOWS_PER_TRAINING)
        self._accuracy = deque[float](maxlen=self._window)
        self._kl = deque[float](maxlen=MIN_WINDOW)
        self._chosen: list[float] = []  # rewards
        self._rejected: list[float] = []
        self._lengths, self._seen = [0.0, 0.0], 0  # sums over steps of chosen, rejected
        self._said: set[str] = set()

    def see(self, step: int, figures: Figures) -> list[str]:
        """Take the figures of optimiser step `step`, counted from 1.

        figures: means over the step's pairs of accuracy, chosen_reward, rejected_reward (beta times log-ratio),
            chosen_length, rejected_length (tokens) and kl_per_token (nats); others are not read.

        Returns:
            Warnings that this step gives rise to, one line each, none of them twice in a training.
        """
        self._seen += 1
        self._accuracy.append(figures["accuracy"])
        kl = figures["kl_per_token"]
        self._kl.append(math.inf if math.isnan(kl) else kl)  # no number: far away, too
        self._chosen.append(figures["chosen_reward"])
        self._rejected.append(figures["rejected_reward"])
        for side, name in enumerate(("chosen_length", "rejected_length")):
            self._lengths[side] += figures[name]
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
    """How far the last `size` values are below the first, by their means; 0 where noise or a dip before explains it."""
    start, middle, end = rewards[:size], rewards[size:-size], rewards[-size:]
    fall = fmean(start) - fmean(end)
    error = math.sqrt((variance(start) + variance(end)) / size)
    return fall if fall > FALL_ERRORS * error and fmean(end) < fmean(middle) else 0.0
