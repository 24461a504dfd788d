"""The nodes of the cluster: which there are, which an autoscaler may add, and the same question to each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dpo4rec_ray.workers.room import Node

T = TypeVar("T")
GROUP_LABEL = "ray.io/node-group"  # of a node that an autoscaler or KubeRay has started
# Where `ray up` puts the cluster's file on its head, on which submitted jobs run.
AUTOSCALER_FILE = Path("~/ray_bootstrap_config.yaml")
MOST_NODES = 1000  # of a type without a limit
ANSWER_S = 60.0


def nodes_there() -> list[Node]:
    """The nodes that are alive, the largest address last."""
    import ray

    found = [
        Node(node["NodeManagerAddress"], dict(node["Resources"]), dict(node.get("Labels") or {}))
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: node.name)


def nodes_that_may_come(there: list[Node]) -> list[Node] | None:
    """Nodes that an autoscaler can still add, one by one; none where there is no autoscaler; None: its limits are not known."""
    file = AUTOSCALER_FILE.expanduser()
    if file.is_file():
        import yaml

        return may_come(yaml.safe_load(file.read_text(encoding="utf-8")), there)
    return None if any(node.labels.get(GROUP_LABEL) for node in there) else []


def may_come(config: dict[str, Any], there: list[Node]) -> list[Node]:
    """The nodes that a cluster's file (`ray up`) allows beside those that there are."""
    workers = max(0, int(config.get("max_workers", 2)) - (len(there) - 1))
    found: list[Node] = []
    for name, kind in config.get("available_node_types", {}).items():
        if name == config.get("head_node_type"):
            continue
        resources = {key: float(value) for key, value in kind.get("resources", {}).items()}
        shape = {key: resources.get(key, 0) for key in ("CPU", "GPU")}
        # The autoscaler gives a type's labels to its nodes, which tells spot nodes from others of the same size.
        labels = dict(kind.get("labels") or {})
        running = sum(
            shape == {key: node.resources.get(key, 0) for key in shape}
            and labels.items() <= node.labels.items()
            for node in there
        )
        left = int(kind.get("max_workers", MOST_NODES)) - running
        found += [Node(f"type {name}", resources, labels)] * max(0, min(left, workers))
    return found


def ask_each_node(function: Callable[..., T], *arguments: Any) -> dict[str, T]:
    """What `function(*arguments)` returns on each node with CPUs, by address; without those that do not answer in time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0)(function)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            *arguments
        ): node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU")
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    return {asked[one]: ray.get(one) for one in answered}
