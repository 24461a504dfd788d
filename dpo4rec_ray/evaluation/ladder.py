"""The diagnosis of a round, rung by rung from the texts to the test users: value, interval, verdict and why.

Each rung needs the ones before it (docs/method.md section 4), so the first one that does not hold is where to look. All values
come from the manifests' stats and the evaluation's comparisons; nothing is measured here. A rung whose figures a run does not
have is left out.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

from dpo4rec_ray.core.intervals import proportion_interval
from dpo4rec_ray.evaluation.heldout_pairs import judged_users
from dpo4rec_ray.evaluation.systems import HEADLINE, label
from dpo4rec_ray.knowledge.teacher import EVERY_FACET

Stats = Mapping[str, Any]
NDCG = HEADLINE[1]
HOLDS, FAILS, NOT_SHOWN = "holds", "fails", "not shown"
# Beginnings of the names of rungs whose value is a level and not a difference.
LEVELS = ("spread", "DPO accuracy")
TOO_MANY_TIED = 0.5  # share of users whose best text is tied, from which on luck chooses the pairs


class Rung(TypedDict):
    """One step of the chain, as it stands in summary.json.

    Attributes:
        name: of the rung.
        value: what is tested, beside `bound`.
        ci95: its 95 % interval; None where it has none.
        bound: what the value must exceed.
        verdict: HOLDS where the interval lies above the bound, FAILS where below, NOT_SHOWN where it includes it or there is
            no interval.
        says: one sentence with the figures behind it.
    """

    name: str
    value: float
    ci95: list[float] | None
    bound: float
    verdict: str
    says: str


def ladder(
    round_id: int, reward: Stats, scores: Stats, policy: Stats, heldout: Stats, comparisons: Sequence[Stats]
) -> list[Rung]:
    """The rungs of a round, from the first to the last.

    reward, scores, policy, heldout: stats of the manifests of `reward` and of the round's others, the figures of `heldout` since
    the base LLM, as those of the evaluation are; comparisons: of the evaluation.
    """
    return [
        *_texts(heldout),
        *_channel(reward),
        *_reader(reward),
        *_reward(scores),
        *_dpo(policy),
        *_heldout(heldout),
        *_test(round_id, comparisons),
    ]


def first_broken(rungs: Sequence[Rung]) -> Rung | None:
    """The first rung that fails or is not shown; None where all hold."""
    return next((rung for rung in rungs if rung["verdict"] != HOLDS), None)


def figures(rung: Rung) -> str:
    """The value with its interval for people: a difference has a sign, a level has none and fewer digits."""
    form = ".3f" if rung["name"].startswith(LEVELS) else "+z.4f"
    ends = " [{0:{2}}, {1:{2}}]".format(*rung["ci95"], form) if rung["ci95"] else ""
    return f"{rung['value']:{form}}{ends}"


def _rung(
    name: str,
    value: float,
    ci95: Sequence[float | None] | None,
    says: str,
    *,
    bound: float = 0.0,
    verdict: str | None = None,
) -> Rung:
    """A rung whose verdict follows from its interval, unless it is given."""
    # An end that is not known is NaN, and null once it was in a manifest.
    known = [float(end) for end in ci95 or () if end is not None and not math.isnan(end)]
    ends = known if len(known) == 2 else None
    if verdict is None:
        low, high = ends or (bound, bound)
        verdict = HOLDS if low > bound else FAILS if high < bound else NOT_SHOWN
    return Rung(name=name, value=float(value), ci95=ends, bound=bound, verdict=verdict, says=says)


def _texts(heldout: Stats) -> Iterator[Rung]:
    before, after = (heldout.get(f"accuracy_by_facet_{side}", {}) for side in ("before", "after"))
    if EVERY_FACET in before:
        one = before[EVERY_FACET]
        facets = ", ".join(
            f"{facet} {found['corrected']:.2f} -> {after[facet]['corrected']:.2f}"
            for facet, found in before.items()
            if facet != EVERY_FACET and facet in after
        )
        yield _rung(
            "text accuracy",
            one["corrected"],
            one["corrected_ci95"],
            f"{one['accuracy']:.1%} of what the texts name is true, {one['chance']:.1%} would be by chance; the value is what "
            f"chance leaves. Before and after the round: {facets}",
        )
    if fit := heldout.get("figures", {}).get("fit_above"):
        yield _rung(
            "fit to later likes",
            fit["before"],
            fit["before_ci95"],
            "share of later likes that have what the texts name, above all other users' share, without a reranker; "
            f"after the round {_change(fit)}",
        )


def _channel(reward: Stats) -> Iterator[Rung]:
    """What texts add on validation where rerankers are trained on them: an oracle's, if that was measured, else counted ones'."""
    gains = reward.get("channel", {})
    best = next((kind for kind in ("oracle", "statistics") if kind in gains), None)
    if best is None:
        return
    made = {
        "oracle": "made from later likes, the most that texts can reach",
        "statistics": "counted from the history",
    }
    others = ", ".join(
        f"{kind} {one['gain']:+.4f}" for kind, one in gains.items() if kind not in (best, "random")
    )
    value, error = gains[best]["gain"], gains[best]["std_error"]
    yield _rung(
        "channel",
        value,
        None if error is None else (value - 1.96 * error, value + 1.96 * error),
        f"{reward.get('channel_metric', NDCG).upper()} that a text adds on validation which is {made[best]}; "
        f"others: {others or 'none'}",
    )


def _reader(reward: Stats) -> Iterator[Rung]:
    if "shuffle_drop" in reward:
        yield _rung(
            "shuffle drop",
            reward["shuffle_drop"],
            reward.get("shuffle_drop_ci95"),
            "NDCG@5 that the reward's reranker loses with another user's text; at 0 it does not read, and rewards are noise",
        )


def _reward(scores: Stats) -> Iterator[Rung]:
    if "best tied" in scores:
        spread, tied = scores["spread"], scores["best tied"]
        yield _rung(
            "spread",
            spread,
            None,
            f"standard deviation of a user's rewards; the best text is tied for {tied:.1%} of users (half of them is too many)",
            verdict=HOLDS if spread > 0 and tied < TOO_MANY_TIED else FAILS,
        )
    if scores.get("gap_held_out") is not None:
        yield _rung(
            "carry-over",
            scores["gap_held_out"],
            scores["gap_held_out_ci95"],
            f"{scores['carried']:.1%} of the gap between best and worst text is left on other lists",
        )


def _dpo(policy: Stats) -> Iterator[Rung]:
    """Accuracy on held-out pairs, and by kind of the rejected text where the pairs are of several kinds."""
    rows = policy.get("rows") or policy.get("pairs", {})
    for name, key, kind in (
        ("DPO accuracy", "accuracy", None),
        ("DPO accuracy, own texts", "heldout_accuracy_own", "own"),
        ("DPO accuracy, other users' texts", "heldout_accuracy_other", "other"),
    ):
        accuracy, users = policy.get(key), judged_users(rows, kind)
        if accuracy is not None and users:
            yield _rung(
                name,
                accuracy,
                proportion_interval(accuracy, users),
                f"of the held-out pairs of {users} users; a half is chance",
                bound=0.5,
            )


def _heldout(heldout: Stats) -> Iterator[Rung]:
    figures = heldout.get("figures", {})
    for name, figure, says in (
        ("held-out reward", "reward", "change of the reward of fresh texts of users that DPO never saw: "),
        (
            "reading gain",
            "reading",
            "change of own texts' reward minus other users' texts' on the same lists, which is what is about the user: ",
        ),
        ("reading gain in NDCG@5", "reading_ndcg", "the same in NDCG@5: "),
    ):
        if found := figures.get(figure):
            yield _rung(name, found["change"], found["change_ci95"], says + _change(found))
    if style := figures.get("others_reward"):
        reading, gain = figures["reading"]["change"], style["change"]
        more = "less" if gain <= reading else "more"
        yield _rung(
            "style gain",
            gain,
            style["change_ci95"],
            f"change of other users' texts' reward, which is manner; {more} than the reading gain: {_change(style)}",
            verdict=HOLDS if gain <= reading else FAILS,
        )


def printed(rungs: Sequence[Rung], width: int = 110) -> str:
    """The rungs for a terminal: a line each, its sentence below, and where to look first."""
    lines = []
    for rung in rungs:
        value, _, ends = figures(rung).partition(" ")
        lines.append(f"  {rung['name']:<46}{value:>9} {ends:<20} {rung['verdict']}")
        lines += textwrap.wrap(rung["says"], width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    broken = first_broken(rungs)
    return "\n".join([*lines, f"  look first at: {broken['name']}"] if broken else lines)


def _test(round_id: int, comparisons: Sequence[Stats]) -> Iterator[Rung]:
    for row in comparisons:
        own = row["system"] == f"dpo4rec-round{round_id}" and row["metric"] == NDCG
        if own:
            yield _rung(
                f"test users, {label(row['backbone'])} against {row['against']}",
                row["delta"],
                row["ci95"],
                "NDCG@5 on identical lists",
            )


def _change(figure: Stats) -> str:
    return f"{figure['before']:.4f} -> {figure['after']:.4f}"
