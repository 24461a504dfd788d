"""How many held-out pairs an accuracy is worth."""

from __future__ import annotations

from collections.abc import Mapping

KINDS = ("own", "other")  # of the rejected text (core.pairing.Kind)


def judged_pairs(rows: Mapping[str, int]) -> int:
    """Of the accuracy of all held-out pairs, which `train.heldout.mixed` weighs by kind as training does: the number of equally
    weighed pairs that is as sure.

    rows: of a policy's stats; older versions know no kinds.
    """
    held = {kind: count for kind in KINDS if (count := rows.get(f"valid_{kind}", 0))}
    if not held:
        return rows.get("valid", 0)
    weights = {kind: rows.get(f"train_{kind}", 0) for kind in held}
    if not sum(weights.values()):
        weights = dict.fromkeys(held, 1)
    return round(sum(weights.values()) ** 2 / sum(weights[kind] ** 2 / held[kind] for kind in held))
