"""Watches a training on texts without pairs (best-of-N, GRPO) for signs of trouble, and warns of each kind once."""

from __future__ import annotations

from collections import deque
from statistics import fmean, median

WINDOW = 5  # steps
# A policy that gives its training texts twice the log-probability per token writes hardly anything else.
COLLAPSED = 0.5
# Where so many tokens are clipped, most of a step's gradient is lost: the policy has moved far from the one that wrote the texts.
CLIPPED = 0.3


class TextWatch:
    """Warnings for one training of `num_steps` optimiser steps. After a resume it needs to see the earlier steps again."""

    def __init__(self, num_steps: int, max_kl_per_token: float):
        """max_kl_per_token: in nats."""
        self._num_steps, self._max_kl = num_steps, max_kl_per_token
        self._recent = {
            name: deque[float](maxlen=WINDOW) for name in ("kl_per_token", "clip_share", "surprise")
        }
        self._first: list[float] = []  # surprise of the first steps
        self._said: set[str] = set()

    def see(self, step: int, metrics: dict[str, float]) -> list[str]:
        """Take the metrics of optimiser step `step`, counted from 1: kl_per_token and clip_share of
                GRPO, surprise (minus the log-probability per token) of both.

        Returns:
            New warnings, one line each; no warning comes twice in a training.
        """
        for name, values in self._recent.items():
            if name in metrics:
                values.append(metrics[name])
        if "surprise" in metrics and len(self._first) < WINDOW:
            self._first.append(metrics["surprise"])
        found = {"kl": self._far(), "clip": self._clipped(), "collapse": self._collapsed()}
        new = {name: text for name, text in found.items() if text and name not in self._said}
        self._said.update(new)
        return [f"step {step} of {self._num_steps}: {text}" for text in new.values()]

    def _full(self, name: str) -> list[float]:
        return list(self._recent[name]) if len(self._recent[name]) == WINDOW else []

    def _far(self) -> str:
        # The median: a single token with an extreme ratio can lift one step's mean.
        kl = self._full("kl_per_token")
        if not kl or median(kl) <= self._max_kl:
            return ""
        return (
            f"the policy is {median(kl):.3g} nats per token from the reference (median of the last {WINDOW} steps), above the "
            f"bound of {self._max_kl:g}: its texts may degrade; raise grpo.kl_weight, or lower the learning rate or the epochs"
        )

    def _clipped(self) -> str:
        share = self._full("clip_share")
        if not share or fmean(share) <= CLIPPED:
            return ""
        return (
            f"{fmean(share):.0%} of the tokens are clipped: the policy has moved further from the one that wrote the texts than "
            "they can teach; lower the learning rate or the epochs, or raise run.turns_per_round"
        )

    def _collapsed(self) -> str:
        now = self._full("surprise")
        if not now or fmean(now) >= COLLAPSED * fmean(self._first):
            return ""
        return (
            f"the texts' log-probability per token rose from {-fmean(self._first):.3g} to {-fmean(now):.3g}: the policy is about "
            "to write the same again and again; lower the learning rate or the epochs"
        )
