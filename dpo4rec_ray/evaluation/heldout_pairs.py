"""How many independent answers the accuracy of held-out pairs is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping

KINDS = ("own", "other")  # of the rejected text (core.pairing.Kind)


def judged_users(rows: Mapping[str, int], kind: str | None = None) -> int:
    """How many independent answers the accuracy of held-out pairs is as sure as, at least.

    A user's pairs share texts and history, so they count as one, as if all of them were right or wrong together. Of all kinds
    together the accuracy is weighed by kind as training is (`train.heldout.mixed`), and a user's pairs of two kinds count as
    one, too: the standard errors of the kinds add up.

    rows: of a policy's stats; older versions know no users, or no kinds. kind: of one kind alone.
    """
    held = {
        one: count for one in KINDS if (count := rows.get(f"valid_{one}_users", rows.get(f"valid_{one}", 0)))
    }
    if kind:
        return held.get(kind, 0)
    if not held:
        return rows.get("valid", 0)
    weights = {one: rows.get(f"train_{one}", 0) for one in held}
    if not sum(weights.values()):
        weights = dict.fromkeys(held, 1)
    return round((sum(weights.values()) / sum(weights[one] / math.sqrt(held[one]) for one in held)) ** 2)
