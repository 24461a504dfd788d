"""Which workers fit on which nodes: by hand, on clusters of a few nodes."""

from __future__ import annotations

import pytest

from dpo4rec_ray.workers.needs import GIB, Needs
from dpo4rec_ray.workers.room import Node, Workers, fits_labels, how_many_fit, refusal

CPU_NODE = Node("10.0.0.1", {"CPU": 8, "memory": 32 * GIB})
GPU_NODE = Node(
    "10.0.0.2", {"CPU": 8, "GPU": 2, "memory": 64 * GIB, "accelerator_type:A10G": 1}, {"zone": "a"}
)
BIG_NODE = Node("10.0.0.3", {"CPU": 4, "GPU": 4, "accelerator_type:H100": 1}, {"zone": "b"})
CLUSTER = [CPU_NODE, GPU_NODE, BIG_NODE]


@pytest.mark.parametrize(
    ("selector", "in_a", "without"),
    [("a", True, False), ("!a", False, True), ("in(a, b)", True, False), ("!in(b,c)", True, True)],
)
def test_labels(selector: str, in_a: bool, without: bool) -> None:
    assert fits_labels({"zone": selector}, {"zone": "a"}) == in_a
    assert fits_labels({"zone": selector}, {}) == without


@pytest.mark.parametrize(
    ("needs", "most"),
    [
        (Needs(1), 20),
        (Needs(3), 5),  # 2 + 2 + 1: what is left of a node adds up to nothing
        (Needs(1, 1), 6),
        (Needs(0.1, 0.5), 12),
        (Needs(1, 2), 3),
        (Needs(1, 3), 1),
        (Needs(1, 4), 1),
        (Needs(1, 5), 0),
        (Needs(9), 0),
        (Needs(1, 1, resources={"accelerator_type:A10G": 0.001}), 2),
        (Needs(1, 1, labels={"zone": "!a"}), 4),
        (Needs(1, memory=32 * GIB), 3),  # 1 + 2; a node that says nothing of memory has none
        (Needs(1, 6, num_bundles=6), 1),
        (Needs(1, 3, num_bundles=3), 2),
    ],
)
def test_workers_of_one_kind(needs: Needs, most: int) -> None:
    assert how_many_fit([Workers("workers", 100, needs)], CLUSTER) == [most]


def test_workers_without_gpus_leave_the_gpu_nodes_to_the_others() -> None:
    groups = [Workers("encoders", 8, Needs(1)), Workers("engines", 2, Needs(6, 1))]
    assert how_many_fit(groups, [GPU_NODE, CPU_NODE, GPU_NODE]) == [8, 2]


def test_the_fewest_come_before_the_others() -> None:
    """Two CPUs: three engines would take both, and the encoder behind them would never start."""
    node = Node("here", {"CPU": 2})
    groups = [Workers("engines", 3, Needs(1), least=1), Workers("encoders", 1, Needs(1), least=1)]
    assert how_many_fit(groups, [node]) == [1, 1]
    assert not refusal(groups, [node], "this machine has")


def test_what_no_node_can_hold_is_named_with_the_nodes() -> None:
    needs = Needs(1, 8, resources={"accelerator_type:H100": 0.001})
    group = Workers("engines", 2, needs, "generate.num_engines, gpus_per_engine", least=1)
    assert refusal([group], CLUSTER, "the nodes are") == (
        "no node can hold one of the engines (1 CPU, 8 GPUs, GPUs of type H100): the nodes are 10.0.0.1 (8 CPUs), "
        "10.0.0.2 (8 CPUs, 2 GPUs, GPUs of type A10G), 10.0.0.3 (4 CPUs, 4 GPUs, GPUs of type H100); change "
        "generate.num_engines, gpus_per_engine, accelerator_type, label_selector, resources, memory_gib, or add nodes"
    )
    labelled = Workers("encoders", 1, Needs(1, labels={"zone": "c"}))
    assert (
        "10.0.0.1 (8 CPUs, zone = none), 10.0.0.2 (8 CPUs, 2 GPUs, GPUs of type A10G, zone = a)"
        in refusal([labelled], CLUSTER, "the nodes are")
    )


def test_what_fits_alone_but_not_together() -> None:
    groups = [Workers("workers of dpo", 7, Needs(1, 1), "policy.num_workers")]
    said = refusal(groups, CLUSTER, "the nodes are")
    assert said.startswith("7 workers of dpo (1 CPU, 1 GPU each) cannot run at the same time: the nodes are ")
    assert said.endswith("; change policy.num_workers, or add nodes")


def test_many_nodes_of_one_kind_are_counted() -> None:
    nodes = [Node(f"n{i}", {"CPU": 1}) for i in range(9)]
    assert "the nodes are n0, n1, n2, n3 and 5 more (1 CPU);" in refusal(
        [Workers("workers", 1, Needs(2))], nodes, "the nodes are"
    )
