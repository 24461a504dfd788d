"""Why a round is no better than the best one before it: what in its figures points to a cause, one sentence each.

Everything comes from the stats of the round's manifests; nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from dpo4rec_ray.core.intervals import proportion_interval, signed
from dpo4rec_ray.core.reading_gain import Verdict
from dpo4rec_ray.evaluation.heldout_pairs import judged_users
from dpo4rec_ray.evaluation.turn_figures import LESS_VARIED, LONGER

Stats = Mapping[str, Any]
MORE_ALIKE = 0.25  # share of texts that begin alike now and did not before


def reasons(
    verdict: Verdict, heldout: Stats, policy: Stats, scores: Stats, max_kl_per_token: float
) -> list[str]:
    """Sentences: first what decided, then each sign of a cause; one that says so where there is no sign.

    Args:
        verdict: of `core.reading_gain.judge`, against the best round before.
        heldout, policy, scores: stats of the round's manifests; scores of its first turn, policy of its last.
        max_kl_per_token: policy.max_kl_per_token, in nats.
    """
    signs = [
        *_training(policy, max_kl_per_token),
        *_texts(heldout),
        *_manner(heldout),
        *_reward(scores),
    ]
    if not signs:
        worse = verdict.reward.high < 0 or verdict.reading.high < 0
        signs = [
            "no figure of the round points to a cause: "
            + ("read its pairs and texts (report.html)" if worse else "it may be as good as the one before")
        ]
    return [*_decided(verdict), *signs]


def _decided(verdict: Verdict) -> Iterator[str]:
    reward, reading = verdict.reward, verdict.reading
    if not reward.mean > 0:
        yield f"the held-out reward is not higher: {signed(reward.mean, (reward.low, reward.high))}"
    if reading.high < 0:
        yield f"its texts say less about their users: reading {signed(reading.mean, (reading.low, reading.high))}"


def _training(policy: Stats, max_kl: float) -> Iterator[str]:
    kl = policy.get("kl_per_token")
    pull = {"dpo": "raise dpo.beta, or ", "grpo": "raise grpo.kl_weight, or "}.get(
        policy.get("objective", "dpo"), ""
    )
    if kl is not None and kl > max_kl:
        yield (
            f"the policy is {kl:.3g} nats per token from its reference, above the bound of {max_kl:g} "
            f"(policy.max_kl_per_token): {pull}lower policy.lr or policy.epochs"
        )
    accuracy, users = policy.get("accuracy"), judged_users(policy.get("rows", {}))
    if accuracy is not None and users and proportion_interval(accuracy, users)[0] <= 0.5:
        yield (
            f"held-out pairs are not told apart (accuracy {accuracy:.2f}, {users} users): nothing that holds for other users was "
            "learned; use more users or clearer pairs (pair.min_std_errors)"
        )


def _texts(heldout: Stats) -> Iterator[str]:
    words = heldout["figures"].get("words")
    if words and not 1 / LONGER <= words["after"] / max(words["before"], 1e-9) <= LONGER:
        more = "longer" if words["after"] > words["before"] else "shorter"
        yield f"its texts are much {more}: {words['before']:.0f} -> {words['after']:.0f} words"
    before, after = heldout.get("distinct_texts_before"), heldout.get("distinct_texts_after")
    if before and after is not None and after < LESS_VARIED * before:
        yield (
            f"its texts vary less: {before:.0%} -> {after:.0%} of a user's are distinct; raise generate.temperature or lower "
            "policy.lr"
        )
    alike = heldout["figures"].get("common_opening")
    if alike and alike["after"] > alike["before"] + MORE_ALIKE:
        yield f"its texts begin alike: {alike['before']:.0%} -> {alike['after']:.0%} have the most common opening"


def _manner(heldout: Stats) -> Iterator[str]:
    style, reading = (heldout["figures"].get(name) for name in ("others_reward", "reading"))
    if style and reading and style["change_ci95"][0] > 0 and reading["change"] <= 0:
        yield (
            f"it learned a manner: what texts are worth to anybody rose by {style['change']:.4f}, what they say of their user "
            f"did not ({reading['change']:+.4f}); use reward.personal or pair.others_share"
        )


def _reward(scores: Stats) -> Iterator[str]:
    ends = scores.get("gap_held_out_ci95") or [None]
    if ends[0] is not None and not ends[0] > 0:
        carried = scores["carried"]
        left = "" if carried is None or math.isnan(carried) else f" ({carried:.0%} of the gap is left)"
        yield (
            f"the reward's choices do not carry over to a user's other lists{left}: it learned from noise; use more "
            "reward.num_redraws or more lists per user"
        )
