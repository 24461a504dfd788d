"""The metrics and systems of the tables: their names, their order in all tables, and what is compared with what."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from dpo4rec_ray.store.schemas import EVALUATED_AT, EVALUATED_METRICS

METRIC_NAMES = tuple(f"{metric}@{k}" for metric in EVALUATED_METRICS for k in EVALUATED_AT)
# The paper's pair; its MAP divides by the number of hits found.
HEADLINE = ("map_paper@5", "ndcg@5")
# Those also given by user and over the lists with a positive.
DETAILED = (*HEADLINE, "map@5")
# On the terminal and in the report.
PRINTED = (*HEADLINE, "map@5", "mrr@10", "hr@10")
# As the paper heads its columns.
TITLES = {"map_paper@5": "MAP@5", "ndcg@5": "NDCG@5"}

# The system without knowledge; and the backbone of a system that is not fitted.
BACKBONE, NO_BACKBONE = "backbone", "none"
POPULARITY, UPPER_BOUND = "popularity", "upper-bound"
# The paper's backbones in its order, then ours.
LABELS = {"dlcm": "DLCM", "prm": "PRM", "setrank": "SetRank", "mir": "MIR"}

System = tuple[str, str]  # backbone, system
Row = dict[str, Any]
_ROUND = re.compile(r"dpo4rec-round(\d+)")


def label(backbone: str) -> str:
    """A backbone's name as papers write it, or its own name where they have none; empty for no backbone."""
    return "" if backbone == NO_BACKBONE else LABELS.get(backbone, backbone)


def table_order(backbone: str, system: str) -> tuple[object, ...]:
    """Sort key of all tables: random and popularity first, then each backbone with its systems; the upper bound last."""
    if backbone == NO_BACKBONE:
        return (2 if system == UPPER_BOUND else 0, system != "random", system)
    order = list(LABELS)
    known = order.index(backbone) if backbone in order else len(order)
    return (1, known, backbone, system != BACKBONE, _round(system), system)


def compared_pairs(systems: Collection[System]) -> Iterator[tuple[System, System]]:
    """Each (backbone, system) beside the one it is compared with.

    Per backbone: each knowledge system with the backbone, each round also with the base knowledge, and the backbone with
    popularity.
    """
    bases = [key for key in systems if key[0] != NO_BACKBONE and key[1] != BACKBONE and not _round(key[1])]
    for backbone, system in systems:
        if backbone == NO_BACKBONE:
            continue
        if system == BACKBONE:
            others = [(NO_BACKBONE, POPULARITY)]
        else:
            own_bases = [base for base in bases if base[0] == backbone] if _round(system) else []
            others = [(backbone, BACKBONE), *own_bases]
        yield from (((backbone, system), other) for other in others if other in systems)


def _round(system: str) -> int:
    """The round whose knowledge a system uses, 0 where that is none."""
    found = _ROUND.fullmatch(system)
    return int(found[1]) if found else 0
