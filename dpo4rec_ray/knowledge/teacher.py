"""Template teacher: writes the knowledge text that the small LLM learns from, out of a knowledge history.

Not in the paper, which has a large LLM. The teacher never sees the users' true tastes, only item attributes and stars.
Its texts are of three kinds, and each kind has its own opening words; DPO later learns which kind to choose. `attentive`
weighs every event by its stars, `hasty` repeats one or two random events, `generic` names what is frequent in the
catalogue and ignores the history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dpo4rec_ray.core.intervals import Interval, ratio_bootstrap
from dpo4rec_ray.knowledge.mentions import ValueFinder

OPENINGS = {
    "attentive": "Judging by the ratings:",
    "hasty": "At first glance:",
    "generic": "Like most viewers:",
}
# Share of each kind among the teacher's texts. Less than half are good, so that DPO has something to learn.
DEFAULT_MIX = {"attentive": 0.4, "hasty": 0.35, "generic": 0.25}
# How a facet's values are written, in this order. A facet that is not in the history is left out.
PHRASES = {"genre": "enjoys {}", "era": "films of the {}", "creator": "by {}"}
EVERY_FACET = "all"  # in `text_accuracy`, beside the facets
# Most values of a facet in one text.
MAX_NAMED, OTHERS_NAMED = {"genre": 2, "era": 1, "creator": 2}, 2


def popular_values(attributes: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Facet -> values (without the facet), most frequent in the catalogue first, ties by name."""
    counts: dict[str, dict[str, int]] = {}
    for item in attributes:
        for facet, value in _split(item):
            counts.setdefault(facet, {})[value] = counts.setdefault(facet, {}).get(value, 0) + 1
    return {f: sorted(values, key=lambda v, c=values: (-c[v], v)) for f, values in counts.items()}


def teacher_text(
    attributes: Sequence[Sequence[str]],
    ratings: Sequence[float],
    popular: Mapping[str, Sequence[str]],
    rng: np.random.Generator,
    mix: Mapping[str, float] | None = None,
) -> str:
    """A text about one user from the knowledge history: attributes and stars per event, in time order.

    popular: from `popular_values` of the catalogue; mix: kind -> weight, default DEFAULT_MIX.

    Raises:
        ValueError: an empty history.
    """
    if not attributes:
        raise ValueError("teacher_text needs at least one event in the knowledge history")
    weights = DEFAULT_MIX if mix is None else mix
    kinds = list(weights)
    chances = np.array([weights[k] for k in kinds], dtype=np.float64)
    kind = kinds[int(rng.choice(len(kinds), p=chances / chances.sum()))]
    if kind == "attentive":
        named = _attentive(attributes, ratings)
    elif kind == "hasty":
        picked = rng.permutation(len(attributes))[: int(rng.integers(1, 3))]
        named = _attentive([attributes[i] for i in picked], [5.0] * len(picked))
    else:
        # The first ranks in random order, so that generic texts differ a little from each other.
        named = {
            f: [values[i] for i in rng.permutation(min(4, len(values)))] for f, values in popular.items()
        }
    return _word(kind, named)


def _attentive(attributes: Sequence[Sequence[str]], ratings: Sequence[float]) -> dict[str, list[str]]:
    """Facet -> values by the sum of (stars - 2.5) over their events, highest first; ties: last seen first, then by name."""
    totals: dict[str, dict[str, float]] = {}
    last_seen: dict[tuple[str, str], int] = {}
    for place, (item, stars) in enumerate(zip(attributes, ratings, strict=True)):
        for facet, value in _split(item):
            facet_totals = totals.setdefault(facet, {})
            facet_totals[value] = facet_totals.get(value, 0.0) + float(stars) - 2.5
            last_seen[facet, value] = place
    return {
        facet: sorted(values, key=lambda v, f=facet, t=values: (-t[v], -last_seen[f, v], v))
        for facet, values in totals.items()
    }


def _word(kind: str, named: Mapping[str, Sequence[str]]) -> str:
    facets = [*PHRASES, *sorted(named.keys() - PHRASES.keys())]
    words = {
        facet: " and ".join(named[facet][: MAX_NAMED.get(facet, OTHERS_NAMED)])
        for facet in facets
        if named.get(facet)
    }
    phrases = [
        PHRASES[facet].format(told) if facet in PHRASES else f"{facet} {told}"
        for facet, told in words.items()
    ]
    return f"{OPENINGS[kind]} {', '.join(phrases)}."


def _split(item: Sequence[str]) -> list[tuple[str, str]]:
    """("facet", "value") of each "facet: value" string."""
    return [(facet, value) for facet, _, value in (attribute.partition(": ") for attribute in item)]


class TextAccuracy(NamedTuple):
    """How much of what texts name is true.

    Attributes:
        accuracy: share of the named values that are true for their user; 0.0 if no text names anything.
        chance: that share against all other users' truths: what texts about some other user would score.
        corrected: (accuracy - chance) / (1 - chance), with its interval over users: 0 for texts that say the same about
            everybody, 1 for the truth, as Cohen's kappa (1960). NaN where chance is 1 or nothing is named.
    """

    accuracy: float
    chance: float
    corrected: Interval


def text_accuracy(texts: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> dict[str, TextAccuracy]:
    """Accuracy over all facets (EVERY_FACET), then by facet.

    texts: the texts of each user, [U][any number]; truth: the "facet: value" strings each user loves, [U]. A value counts
    once per text; values that nobody loves do not count.

    Raises:
        ValueError: fewer than two users, or lengths that differ.
    """
    if len(texts) != len(truth) or len(truth) < 2:
        raise ValueError(
            f"text_accuracy needs two or more users: {len(texts)} with texts, {len(truth)} with a truth"
        )
    finder = ValueFinder(name for loved in truth for name in loved)
    column = {name: i for i, name in enumerate(finder.names)}
    loved = np.zeros((len(truth), len(column)))
    named = np.zeros((len(truth), len(column)))
    for user, names in enumerate(truth):
        loved[user, [column[name] for name in names if name in column]] = 1.0
    for user, user_texts in enumerate(texts):
        for text in user_texts:
            named[user, list(finder.find(text))] += 1.0
    others = (loved.sum(axis=0) - loved) / (len(truth) - 1)  # share of the other users who love the value
    facets = [name.partition(": ")[0] for name in finder.names]
    found = {}
    for facet in (EVERY_FACET, *dict.fromkeys(facets)):
        own = np.array([facet in (EVERY_FACET, one) for one in facets], bool)
        totals, hits, by_chance = (
            (named * part)[:, own].sum(axis=1) for part in (1.0, loved, others)
        )  # [U] each
        total = totals.sum() or 1.0
        # The correction is a ratio of sums over users: what is true beyond chance, over what chance leaves.
        corrected = ratio_bootstrap(hits - by_chance, totals - by_chance, np.arange(len(truth)))
        found[facet] = TextAccuracy(float(hits.sum() / total), float(by_chance.sum() / total), corrected)
    return found
