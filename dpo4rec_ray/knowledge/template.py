"""Filled-in sentences in place of an LLM's texts: for tests and for simulating scale. They do not depend on any taste."""

from __future__ import annotations

from collections.abc import Sequence

from dpo4rec_ray.knowledge.completions import Completion

TEMPLATE_VERSION = 1
_MOODS = ("quiet", "fast", "dark", "warm", "strange", "classic", "recent", "light")


class TemplateGenerator:
    """N different texts per user, at once; the same for the same seed."""

    def generate(
        self, item_ids: Sequence[Sequence[int]], seeds: Sequence[int], num_samples: Sequence[int]
    ) -> list[list[Completion]]:
        """Texts of B users. item_ids: each user's knowledge history; seeds, num_samples: one per user."""
        answers: list[list[Completion]] = []
        for items, seed, count in zip(item_ids, seeds, num_samples, strict=True):
            last = items[-1] if len(items) else 0
            answers.append(
                [
                    Completion(
                        [], f"Simulated: {_MOODS[(seed + i) % 8]} things like item {last}, take {i}.", "stop"
                    )
                    for i in range(count)
                ]
            )
        return answers
