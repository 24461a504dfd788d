"""The verdict on a finished run in words: do texts help, does training add to it, which rung is weak, and what to do next.

A rule on the summary alone (report/page.py): nothing is measured here and no file is read. Whether something helps is said of
NDCG@5 of the test users, paired on identical lists, with the 95 % interval over users.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo4rec_ray.evaluation.advice import ADVICE, COLLAPSE, CONFIRM, COUNTED, HARMS, NOISE, TEST, UNREAD
from dpo4rec_ray.evaluation.ladder import FAILS, HOLDS, NDCG, NOT_SHOWN, Rung, figures
from dpo4rec_ray.evaluation.systems import BACKBONE, TITLES, Row, label

HELPS, NOTHING, MIXED, UNKNOWN = "helps", "nothing shown", "mixed", "unknown"
COLLAPSED = 0.5  # share of the distinct texts from before the round, below which the policy writes the same again and again

BASE_LLM, STATISTICS = "base-llm", "statistics"
OBJECTIVES = {"dpo": "DPO", "best_of_n": "best-of-N", "grpo": "GRPO"}


@dataclass(frozen=True)
class Verdict:
    """What a run says.

    Attributes:
        texts: HELPS, HARMS, NOTHING, MIXED (some backbones gain, others lose) or UNKNOWN (not measured).
        training: the same of the best round, or of the last where none was kept, against the texts before it; UNKNOWN where
            nothing was trained.
        weak: UNREAD, NOISE, COLLAPSE, or the name of the first rung that does not hold; empty where all hold.
        claims: the verdict in sentences with intervals: what texts do, what training adds, the weak rung.
        sentences: what else bears on it.
        advised: the name in ADVICE of what to do.
        next_step: what to do, as a sentence.
        see: the page of the documentation that says more.
    """

    texts: str
    training: str
    weak: str
    claims: tuple[str, ...]
    sentences: tuple[str, ...]
    advised: str
    next_step: str
    see: str

    @property
    def headline(self) -> str:
        """The claims in one line."""
        return " ".join(self.claims)


def verdict(summary: Mapping[str, Any]) -> Verdict:
    """The verdict on a run. summary: of summary.json, also of an older version; what it lacks is left out."""
    comparisons, rounds = summary["comparisons"], summary.get("rounds", [])
    best = summary.get("best_round", 0)
    base = STATISTICS if summary.get("generator") == STATISTICS else BASE_LLM
    served = f"dpo4rec-round{best}" if best else base
    judged = next((row for row in rounds if row["round"] == best), rounds[-1] if rounds else None)

    rows = _rows(comparisons, served, BACKBONE)
    compared = [("texts", row) for row in rows]
    texts, said = _claim(rows, "Texts", ("help", "harm", "add"))
    claims = [said or "What texts add was not measured."]
    training = UNKNOWN
    if judged is not None and (gained := _rows(comparisons, f"dpo4rec-round{judged['round']}", base)):
        rows = gained
        compared += [(_learner(judged), row) for row in rows]
        training, said = _claim(rows, _learner(judged), ("helps", "harms", "adds"))
        claims.append(said)
    weak, why = _weak(summary, judged, served)
    if weak:
        claims.append(f"The weak rung: {why}.")
    advised = _advised(weak, texts, training)
    advice, see = ADVICE[advised]
    more = [*_by_user(compared), *_more(summary, judged, served, training, weak)]
    if needed := _users_needed(summary, rows):
        if advice == ADVICE[TEST][0]:
            advice += needed
        else:
            more.append(f"Test users{needed}.")
    step = f"{advice[:1].upper()}{advice[1:]}."
    return Verdict(texts, training, weak, tuple(claims), tuple(more), advised, step, see)


def _rows(comparisons: Sequence[Row], system: str, against: str) -> list[Row]:
    """Differences of two systems in NDCG@5, one per backbone."""
    return [
        row
        for row in comparisons
        if (row["system"], row["against"], row["metric"]) == (system, against, NDCG)
    ]


def _outcome(row: Mapping[str, Any]) -> str:
    low, high = row["ci95"]
    if low is None or high is None:  # a single test user
        return NOTHING
    return HELPS if low > 0 else HARMS if high < 0 else NOTHING


def _claim(rows: Sequence[Row], subject: str, verbs: tuple[str, str, str]) -> tuple[str, str]:
    """The outcome over all backbones, and a sentence that names each. verbs: of the subject, to help, to harm and to add."""
    found = {kind: [row for row in rows if _outcome(row) == kind] for kind in (HELPS, HARMS, NOTHING)}
    helps, harms, adds = verbs
    clauses = []
    for kind, verb in (
        (HELPS, f"{helps} "),
        (HARMS, f"{harms} "),
        (NOTHING, f"{adds} nothing measurable to "),
    ):
        if found[kind]:
            form = "{} ({})" if kind == NOTHING else "{} by {}"
            clauses.append(
                verb + ", ".join(form.format(label(row["backbone"]), _figure(row)) for row in found[kind])
            )
    kinds = [kind for kind in (HELPS, HARMS) if found[kind]]
    outcome = MIXED if len(kinds) == 2 else kinds[0] if kinds else NOTHING if rows else UNKNOWN
    return outcome, f"{subject} {', and '.join(clauses)}." if rows else ""


def _figure(row: Mapping[str, Any]) -> str:
    return f"{row['delta']:+z.4f} {TITLES[NDCG]}{_range(row['ci95'])}"


def _range(ends: Sequence[float | None] | None) -> str:
    return "" if ends is None or None in ends else " [{:+z.4f}, {:+z.4f}]".format(*ends)


def _learner(row: Mapping[str, Any]) -> str:
    """What trained a round; of several turns that differ, all of them."""
    one: str = row.get("training", {}).get("objective", "dpo")
    own: list[str] = [turn["objective"] for turn in row.get("turns", [])] or [one]
    return " and ".join(OBJECTIVES.get(name, name) for name in dict.fromkeys(own))


def _weak(summary: Mapping[str, Any], judged: Mapping[str, Any] | None, served: str) -> tuple[str, str]:
    """The weak rung and how a sentence names it; both empty where there is none.

    The causes with names of their own come first, in the order of the chain: what follows from them are broken rungs too.
    """
    rungs: list[Rung] = judged.get("ladder", []) if judged else []
    by_name = {rung["name"]: rung for rung in rungs}
    for name, cause, why in (
        ("shuffle drop", UNREAD, "the reward's rerankers do not read their texts, so rewards are noise"),
        ("spread", NOISE, "a user's texts get the same rewards, so luck chooses the pairs"),
        ("carry-over", NOISE, "the reward does not carry over to other lists of the same user"),
    ):
        if name in by_name and _broken(by_name[name]):
            return cause, why
    if judged is not None and (why := _collapse(judged)):
        return COLLAPSE, why
    used = [row for row in summary.get("use_of_texts", []) if row["system"] == served]
    if used and not any(row["used"] for row in used):
        fits = sum(row["fits"] for row in used)
        return (
            UNREAD,
            f"in none of {fits} fits do the rerankers use the texts: validation shows no gain of them",
        )
    broken = next(filter(_broken, rungs), None)
    if broken is None:
        return "", ""
    said = "fails" if broken["verdict"] == FAILS else f"is not shown to be above {broken['bound']:g}"
    return broken["name"], f"{broken['name']}, {figures(broken)}, {said}"


def _broken(rung: Rung) -> bool:
    """Whether it fails, or has an interval that includes its bound. A rung without an interval (a single user) says nothing."""
    return rung["verdict"] == FAILS or (rung["verdict"] == NOT_SHOWN and rung["ci95"] is not None)


def _collapse(row: Mapping[str, Any]) -> str:
    """Why the texts of a round count as collapsed: a user's own became the same, or those of all users; empty if they do not."""
    own = row.get("figures", {}).get("distinct_texts")
    high = own["change_ci95"][1] if own else None  # not known of a single user
    if own and own["after"] <= COLLAPSED * own["before"] and high is not None and high < 0:
        return f"a user's texts became the same: {own['before']:.0%} of them are distinct before, {own['after']:.0%} after"
    before, after = (row.get("diagnosis", {}).get(f"distinct_overall_{side}") for side in ("before", "after"))
    if before and after is not None and after <= COLLAPSED * before:
        return (
            f"all users' texts became the same: {before:.0%} of them are distinct before, {after:.0%} after"
        )
    return ""


def _advised(weak: str, texts: str, training: str) -> str:
    """Which of ADVICE holds."""
    if (not weak or weak.startswith(TEST)) and HARMS in (texts, training):
        return HARMS
    if not weak:
        return CONFIRM if texts == HELPS else TEST
    if weak.startswith(TEST) and weak.endswith(f"against {STATISTICS}"):
        return COUNTED
    return next(name for name in ADVICE if weak.startswith(name))


def _users_needed(summary: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """How many test users would show the difference that was seen, if it is real: intervals shrink with the root of users."""
    # Summaries of older versions know the users of the split, which are those that were tested unless data.protocol is "time".
    users = summary.get("test_users", summary.get("prepare", {}).get("splits", {}).get("users/test"))
    seen = [row for row in rows if None not in row["ci95"] and row["delta"] > 0]
    if not users or not seen:
        return ""
    row = max(seen, key=lambda one: one["delta"])
    half = (row["ci95"][1] - row["ci95"][0]) / 2
    needed = users * (half / row["delta"]) ** 2
    if needed <= users:
        return ""
    return (
        f": with {users} the interval is {half:.4f} wide to each side, and a difference of {row['delta']:.4f} would show with "
        f"about {float(f'{needed:.2g}'):,.0f}"
    )


def _by_user(compared: Sequence[tuple[str, Row]]) -> list[str]:
    """What the mean over users says where it is not what that over lists says. compared: what is judged, its difference."""
    found: dict[str, list[str]] = {}
    for subject, row in compared:
        ends = row.get("by user ci95")
        if ends is not None and _outcome({"ci95": ends}) != _outcome(row):
            said = f"{row['by user delta']:+z.4f} {TITLES[NDCG]}{_range(ends)} for {label(row['backbone'])}"
            found.setdefault(said, []).append(subject)
    return [
        f"With every user counted once instead of every list, the difference is {said} ({', '.join(subjects)}): the outcome "
        "depends on how much users with many lists weigh."
        for said, subjects in found.items()
    ]


def _more(
    summary: Mapping[str, Any], judged: Mapping[str, Any] | None, served: str, training: str, weak: str
) -> list[str]:
    """Sentences that bear on the verdict: simulated texts, counted texts, held-out users, luck, which round is served."""
    found = []
    if summary.get("simulated_texts"):
        found.append("The texts are simulated: no number here says anything about an LLM.")
    for row in _rows(summary["comparisons"], served, STATISTICS):
        if weak == f"{TEST}, {label(row['backbone'])} against {STATISTICS}":
            continue  # the claims say it
        than = {HELPS: "better", HARMS: "worse", NOTHING: "not measurably better or worse"}
        found.append(
            f"{label(row['backbone'])} with these texts is {than[_outcome(row)]} than with texts counted from the history, which "
            f"need no LLM: {_figure(row)}."
        )
    if judged is None:
        return found
    first = [row for row in summary.get("use_of_texts", []) if row["system"] == BASE_LLM]
    if first and not any(row["used"] for row in first):
        found.append(
            f"No reranker uses the texts from before training, so {BASE_LLM} ranks as the backbone: differences from either are "
            "the same."
        )
    measured = judged.get("figures_since_base", judged.get("figures", {}))
    rung = {one["name"]: one for one in judged.get("ladder", [])}
    if reward := measured.get("reward"):
        said = f"On users held out from training the reward changes by {_change(reward)}"
        if reading := measured.get("reading"):
            said += f", the part that is about the user (reading gain) by {_change(reading)}"
        found.append(f"{said}.")
    if training == HELPS and "held-out reward" in rung and rung["held-out reward"]["verdict"] != HOLDS:
        found.append("That the held-out reward rose is not shown, so the gain on the test users may be luck.")
    best, count = summary.get("best_round", 0), len(summary["rounds"])
    found.append(
        f"Round {best} of {count} is the best on validation users, so its texts are judged here."
        if best
        else f"None of {count} round{'s' * (count > 1)} is better on validation users than the LLM before training."
    )
    return found


def _change(figure: Mapping[str, Any]) -> str:
    return f"{figure['change']:+z.4f}{_range(figure['change_ci95'])}"


def printed(found: Verdict, first: Sequence[str] = ()) -> str:
    """The verdict for a terminal. first: the change of the recipe to try first (next_change.py)."""
    step = f"Next: {found.next_step} ({found.see})"
    return "\n".join(
        [found.headline, *found.sentences, step, *([f"Try first: {shlex.join(first)}"] if first else [])]
    )
