"""Joins by id: whether two sides belong together, and what would make their ids match.

Ids that were written in two ways ("12.0" here, "12" there) match nothing, and everything goes on without titles or texts. So a
join that matches almost nothing of the smaller side is an error. That a large catalogue is described by a small file is
none: nearly all of the smaller side then matches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpo4rec_ray.errors import UserError

# Of the smaller side. Below it, what matches does so by accident, such as the one id without a leading zero.
MIN_MATCHED = 0.01
# Ids of each side that are compared to find out why they differ.
NUM_COMPARED = 10_000
_WAYS: dict[str, Callable[[str], str]] = {
    'without ".0"': lambda text: re.sub(r"\.0+$", "", text),
    "without blanks around them": str.strip,
    "if case did not matter": str.casefold,
    "without leading zeros": lambda text: text.lstrip("0") or "0",
    "without quotes": lambda text: text.strip("'\""),
}


@dataclass(frozen=True)
class JoinSide:
    """One side of a join: what it is called in a message, how many ids it has, and some of them where they are needed."""

    name: str
    num_ids: int
    some_ids: Callable[[], Sequence[str]]


def check_join(what: str, num_matched: int, left: JoinSide, right: JoinSide) -> None:
    """what: whose ids they are, such as "item". A side without any id is not checked.

    Raises:
        UserError: less than MIN_MATCHED of the smaller side is on both sides.
    """
    smaller = min(left.num_ids, right.num_ids)
    if not smaller or num_matched >= MIN_MATCHED * smaller:
        return
    ours, theirs = left.some_ids(), right.some_ids()
    raise UserError(
        f"{right.name}: {num_matched} of {left.num_ids} {what} ids of {left.name} are in it: {left.name} have ids such as "
        f"{_shown(ours)}, {right.name} has {_shown(theirs)}{way_to_match(ours, theirs)}; write them in the same way, or "
        f"run without {right.name}"
    )


def way_to_match(left: Sequence[str], right: Sequence[str]) -> str:
    """What would make some ids equal, as the end of a sentence; "" where nothing that is known does."""
    for words, way in _WAYS.items():
        if {way(text) for text in left[:NUM_COMPARED]} & {way(text) for text in right[:NUM_COMPARED]}:
            return f", which would match {words}"
    return ""


def _shown(ids: Sequence[str]) -> str:
    return " and ".join(repr(text[:40]) for text in ids[:2]) or "none"
