"""How the watched validation users fare from turn to turn: what their texts are worth to them, to others, and how they look.

The same users are sampled in every turn of a round (core.turn_users), before the turn's training, so the figures of turn t are
those of the policy that turn t-1 trained, beside those of the policy that the round began with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.core.intervals import signed
from dpo4rec_ray.core.reading_gain import changes

_ORDER = [("user_id", "ascending"), ("sample_id", "ascending")]
# Texts so many times as long, or so few times as varied, as in the round's first turn are worth a warning.
LONGER, LESS_VARIED = 1.5, 0.5


def user_figures(
    scores: pa.Table, texts: pa.Table, users: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Users with rewards [U], ascending, and figures [U]: means over each one's texts.

    reward: of the text, style: what it is worth to other users, reading: the difference; words: its length; distinct: share of
    different texts among the user's.

    Args:
        scores: of a turn.
        texts: `generations` of the turn: user_id, sample_id, text.
        users: whose figures are wanted.
    """
    wanted = pa.array(users)
    scored, written = (
        table.filter(pc.is_in(table["user_id"], wanted)).sort_by(_ORDER) for table in (scores, texts)
    )
    ids, starts = np.unique(scored["user_id"].to_numpy(), return_index=True)
    counts = np.diff([*starts, len(scored)])
    own, others = (
        np.add.reduceat(scored[name].to_numpy().astype(np.float64), starts) / counts
        if len(ids)
        else np.zeros(0)
        for name in ("plain_reward", "others_reward")
    )
    per_user = np.split(np.array(written["text"].to_pylist(), dtype=object), starts[1:])
    figures = {
        "reward": own,
        "style": others,
        "reading": own - others,
        "words": np.array([np.mean([len(text.split()) for text in mine]) for mine in per_user[: len(ids)]]),
        "distinct": np.array([len(set(mine)) / len(mine) for mine in per_user[: len(ids)]]),
    }
    return ids, figures


def turn_figures(
    first: tuple[np.ndarray, Mapping[str, np.ndarray]], now: tuple[np.ndarray, Mapping[str, np.ndarray]]
) -> dict[str, dict[str, Any]]:
    """figure -> its means in the round's first turn and now, and the change, with intervals (core.reading_gain.Change).

    first, now: of `user_figures`; compared over the users that both have.
    """
    _, then, here = np.intersect1d(first[0], now[0], assume_unique=True, return_indices=True)
    before, after = (
        {name: values[rows] for name, values in figures.items()}
        for (_, figures), rows in ((first, then), (now, here))
    )
    return {name: change.as_dict() for name, change in changes(before, after).items()}


def lines(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """For the terminal: the curve's new point."""

    def moved(name: str) -> str:
        return f"{figures[name]['before']:.3g} -> {figures[name]['after']:.3g}"

    def change(name: str) -> str:
        one = figures[name]
        return signed(one["change"], one["change_ci95"])

    if "reward" not in figures:
        return
    yield (
        f"{figures['reward']['users']} watched users since the round began: reward {change('reward')}"
        + (f", reading {change('reading')}, style {change('style')}" if "reading" in figures else "")
        + f"; words per text {moved('words')}, distinct texts {moved('distinct')}"
    )


def warnings(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Signs that the policy pleases the reranker without saying more about its users, one sentence each."""
    if "words" not in figures:  # nobody is watched
        return
    if "style" in figures:
        style, reading = figures["style"], figures["reading"]
        if style["change_ci95"][0] > 0 and reading["change"] <= 0:
            yield (
                f"what texts are worth to anybody rose by {style['change']:.4f} and what they say of their user did not "
                f"({reading['change']:+.4f}): a manner is learned; use the personal reward (reward.personal), or stop "
                "here"
            )
    words, distinct = figures["words"], figures["distinct"]
    if words["after"] > LONGER * words["before"]:
        yield (
            f"texts have {words['after']:.0f} words, {words['before']:.0f} when the round began: if the reward rises by length "
            'alone, use grpo.token_weights = "constant", or a lower generate.max_new_tokens'
        )
    if distinct["after"] < LESS_VARIED * distinct["before"]:
        yield (
            f"{distinct['after']:.0%} of a user's texts are distinct, {distinct['before']:.0%} when the round began: there "
            "will be nothing left to choose from; raise the temperature or grpo.kl_weight, or lower the learning rate"
        )
