"""Whether workers can ever be placed: their needs against the nodes that there are, and those that an autoscaler may add.

Ray waits without end, and without a word, for a node that can hold what is asked for. Plain arithmetic, which
`placement.check_room` asks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dpo4rec_ray.workers.needs import GIB, Needs

MAX_SHOWN = 4  # kinds of nodes in a message, and names of nodes of one kind
ALL = -1
_ROUNDING = 1e-6  # Ray itself counts in steps of 1e-4


@dataclass(frozen=True)
class Workers:
    """Workers of one kind that are to run at the same time.

    Attributes:
        what: in plain words, such as "engines".
        keys: of the recipe, that set how many there are and what each takes.
        least: how many have to run for the work to go on; ALL: all of them.
    """

    what: str
    count: int
    needs: Needs = field(default_factory=Needs)
    keys: str = ""
    least: int = ALL

    @property
    def fewest(self) -> int:
        return self.count if self.least == ALL else min(self.least, self.count)


@dataclass(frozen=True)
class Node:
    """A node's resources, all of them and not only what is free, and its labels. name: its address, or its type's name."""

    name: str
    resources: dict[str, float]
    labels: dict[str, str] = field(default_factory=dict)


def fits_labels(wanted: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether a node's labels are as a selector (config/placed.py) wants them; a label that is missing is no value."""
    for name, selector in wanted.items():
        bare = selector.removeprefix("!")
        listed = re.fullmatch(r"in\((.*)\)", bare)
        values = re.split(r", ?", listed[1]) if listed else [bare]
        if (labels.get(name) in values) == selector.startswith("!"):
            return False
    return True


def how_many_fit(groups: Sequence[Workers], nodes: Sequence[Node]) -> list[int]:
    """How many workers of each group can run at the same time: the fewest that each needs first, then the others in turn.

    A plan like Ray's own, not the best there is: a worker goes where the fewest GPUs are, then where the fewest CPUs are free.
    """
    free = [dict(node.resources) for node in nodes]
    placed = [0] * len(groups)
    hardest = sorted(range(len(groups)), key=lambda i: -groups[i].needs.num_gpus)
    for i in hardest:
        while placed[i] < groups[i].fewest and _place(groups[i].needs, nodes, free):
            placed[i] += 1
    growing = set(hardest)
    while growing:
        for i in [i for i in hardest if i in growing]:
            if placed[i] < groups[i].count and _place(groups[i].needs, nodes, free):
                placed[i] += 1
            else:
                growing.discard(i)
    return placed


def _place(needs: Needs, nodes: Sequence[Node], free: list[dict[str, float]]) -> bool:
    """Take a worker's bundles off `free`, if there is room for all of them."""
    after = [dict(one) for one in free] if needs.num_bundles > 1 else free
    for bundle in needs.bundles():
        holds = [
            i
            for i, node in enumerate(nodes)
            if fits_labels(needs.labels, node.labels)
            and all(after[i].get(name, 0) >= amount - _ROUNDING for name, amount in bundle.items())
        ]
        if not holds:
            return False
        best = min(holds, key=lambda i: (nodes[i].resources.get("GPU", 0), after[i].get("CPU", 0)))
        after[best] = after[best] | {name: after[best][name] - amount for name, amount in bundle.items()}
    free[:] = after
    return True


def refusal(groups: Sequence[Workers], nodes: Sequence[Node], here: str) -> str:
    """Why too few of the groups' workers can ever run at the same time; "" if enough can. here: "this machine has", ..."""
    placed = how_many_fit(groups, nodes)
    short = [group for group, count in zip(groups, placed, strict=True) if count < group.fewest]
    if not short:
        return ""
    keys = " or ".join(dict.fromkeys(group.keys for group in short if group.keys))
    if any(group.needs.labels or group.needs.resources or group.needs.memory for group in short):
        keys += ", accelerator_type, label_selector, resources, memory_gib"
    advice = f"; change {keys or 'their number or share in the recipe'}, or add nodes"
    for group in short:
        if not how_many_fit([replace(group, count=1)], nodes)[0]:
            wanted = described(group.needs)
            return f"no node can hold one of the {group.what} ({wanted}): {here} {_shown(nodes, group.needs)}{advice}"
    asked = " and ".join(f"{group.fewest} {group.what} ({described(group.needs)} each)" for group in groups)
    return f"{asked} cannot run at the same time: {here} {_shown(nodes, groups[0].needs)}{advice}"


def described(needs: Needs) -> str:
    """What a worker needs, in words: "1 CPU, 2 GPUs of type A10G, label zone = a"."""
    parts = [
        amounts({"CPU": needs.num_cpus, "GPU": needs.num_gpus, "memory": needs.memory, **needs.resources})
    ]
    if needs.num_bundles > 1:
        parts.append("one GPU a node at least")
    parts += [f"label {name} = {value}" for name, value in needs.labels.items()]
    return ", ".join(filter(None, parts))


def amounts(resources: dict[str, float]) -> str:
    """Resources in words; what Ray adds to every node is left out."""
    found: list[str] = []
    first = [name for name in ("CPU", "GPU", "memory") if name in resources]
    for name in dict.fromkeys([*first, *sorted(resources)]):
        amount = resources[name]
        if not amount or name.startswith("node:") or name == "object_store_memory":
            continue
        if name in ("CPU", "GPU"):
            found.append(f"{amount:g} {name}{'s' * (amount != 1)}")
        elif name == "memory":
            found.append(f"{amount / GIB:.3g} GiB of memory")
        elif name.startswith("accelerator_type:"):
            found.append(f"GPUs of type {name.partition(':')[2]}")
        else:
            found.append(f"{amount:g} {name}")
    return ", ".join(found)


def _shown(nodes: Sequence[Node], needs: Needs) -> str:
    """The nodes by what they have of what is asked for, the largest kinds first."""
    asked = {"CPU", "GPU", *needs.resources, *(["memory"] if needs.memory else [])}
    names: dict[str, list[str]] = {}
    for node in nodes:
        has = {name: node.resources.get(name, 0) for name in sorted(asked)}
        has |= {
            name: amount for name, amount in node.resources.items() if name.startswith("accelerator_type:")
        }
        labels = ", ".join(f"{name} = {node.labels.get(name, 'none')}" for name in needs.labels)
        text = ", ".join(filter(None, [amounts(has) or "no CPU", labels]))
        names.setdefault(text, []).append(node.name)
    if len(nodes) == 1:
        return next(iter(names))
    kinds = sorted(names.items(), key=lambda kind: -len(kind[1]))
    shown = [f"{_list(who)} ({text})" for text, who in kinds[:MAX_SHOWN]]
    more = sum(len(who) for _, who in kinds[MAX_SHOWN:])
    return ", ".join(shown) + (f" and {more} others" if more else "")


def _list(names: Sequence[str]) -> str:
    if len(names) <= MAX_SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:MAX_SHOWN])} and {len(names) - MAX_SHOWN} more"
