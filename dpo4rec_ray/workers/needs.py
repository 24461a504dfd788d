"""What one worker occupies and which nodes it may run on: as the recipe says it, and as Ray takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dpo4rec_ray.config.placed import Placed

GIB = 2**30


@dataclass(frozen=True)
class Needs:
    """What a node must have for a worker.

    Attributes:
        num_gpus: over all bundles.
        resources: custom ones, and `accelerator_type:NAME` as nodes with such GPUs have it.
        labels: what a node's labels must be, by name (config/placed.py).
        strategy: "PACK", "SPREAD", or "": Ray's own for this kind of work.
        num_bundles: above 1, the GPUs may be on so many nodes, one each; the CPUs are on the first.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory: int = 0
    resources: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    strategy: str = ""
    num_bundles: int = 1

    @classmethod
    def of(
        cls, where: Placed | None, num_cpus: float, num_gpus: float = 0.0, *, over_nodes: bool = False
    ) -> Needs:
        """The needs of a worker of a section. over_nodes: each of its GPUs may be on another node."""
        where = where or Placed()
        named = {f"accelerator_type:{where.accelerator_type}": 0.001} if where.accelerator_type else {}
        return cls(
            num_cpus,
            num_gpus,
            int(where.memory_gib * GIB),
            {**where.resources, **named},
            dict(where.label_selector),
            where.placement_strategy,
            int(num_gpus) if over_nodes else 1,
        )

    def bundles(self) -> list[dict[str, float]]:
        """What is taken of each node, as a placement group takes it."""
        first: dict[str, float] = {"CPU": self.num_cpus, "GPU": self.num_gpus / self.num_bundles}
        first |= {"memory": self.memory, **self.resources}
        rest = {**self.resources, "GPU": 1.0}
        found = [first, *[rest] * (self.num_bundles - 1)]
        return [{name: amount for name, amount in bundle.items() if amount} for bundle in found]

    def options(self) -> dict[str, Any]:
        """As `options` of a Ray task or actor and `Dataset.map` take them; of several bundles, without these."""
        found: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        if (
            self.num_bundles > 1
        ):  # what the worker has comes from its placement group, and vLLM's from the other bundles
            return {"num_cpus": self.num_cpus, "num_gpus": 0}
        if self.memory:
            found["memory"] = self.memory
        if self.resources:
            found["resources"] = dict(self.resources)
        if self.labels:
            found["label_selector"] = dict(self.labels)
        if self.strategy:
            found["scheduling_strategy"] = "SPREAD" if self.strategy == "SPREAD" else "DEFAULT"
        return found


class Groups:
    """Placement groups of workers with several bundles: one per worker, until `close`."""

    def __init__(self) -> None:
        self._made: list[Any] = []

    def option(self, needs: Needs) -> Callable[[], dict[str, Any]] | None:
        """What makes the placement group of the next worker and places it there; None where it needs none."""
        return (lambda: self._place(needs)) if needs.num_bundles > 1 else None

    def _place(self, needs: Needs) -> dict[str, Any]:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundles = needs.bundles()
        made = placement_group(
            bundles,
            strategy=needs.strategy or "PACK",
            bundle_label_selector=[dict(needs.labels)] * len(bundles),
        )
        self._made.append(made)
        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                made, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
            )
        }

    def close(self) -> None:
        """Give back what they hold: Ray itself keeps them until the job ends."""
        from ray.util.placement_group import remove_placement_group

        while self._made:
            remove_placement_group(self._made.pop())
