"""Nodes that an autoscaler may still add, from a cluster's file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

from dpo4rec_ray.workers import nodes
from dpo4rec_ray.workers.nodes import GROUP_LABEL, may_come, nodes_that_may_come
from dpo4rec_ray.workers.room import Node

ROOT = Path(__file__).resolve().parents[3]
CONFIG = {
    "max_workers": 4,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 4}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 8}, "max_workers": 2, "labels": {"ray.io/market-type": "spot"}},
        "gpu": {"resources": {"CPU": 8, "GPU": 1}},
    },
}
HEAD, GPU = Node("10.0.0.1", {"CPU": 4}), Node("10.0.0.2", {"CPU": 8, "GPU": 1})


def test_types_up_to_their_own_and_the_clusters_most() -> None:
    found = may_come(CONFIG, [HEAD])
    assert [node.name for node in found] == ["type cpu"] * 2 + ["type gpu"] * 4
    assert found[0] == Node("type cpu", {"CPU": 8.0}, {"ray.io/market-type": "spot"})
    assert [node.name for node in may_come(CONFIG, [HEAD, GPU])] == ["type cpu"] * 2 + ["type gpu"] * 3
    assert may_come(CONFIG, [HEAD, *[GPU] * 4]) == []


def test_where_the_limits_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "AUTOSCALER_FILE", tmp_path / "none.yaml")
    assert nodes_that_may_come([HEAD]) == [], "a cluster that nothing scales"
    assert nodes_that_may_come([HEAD, Node("10.0.0.2", {}, {GROUP_LABEL: "workers"})]) is None
    file = tmp_path / "bootstrap.yaml"
    file.write_text("max_workers: 1\navailable_node_types: {gpu: {resources: {GPU: 8}}}\n")
    monkeypatch.setattr(nodes, "AUTOSCALER_FILE", file)
    assert nodes_that_may_come([HEAD]) == [Node("type gpu", {"GPU": 8.0})]


def test_spot_nodes_use_up_none_of_the_same_size_on_demand() -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    spot = config["available_node_types"]["gpu_spot"]
    labels = {GROUP_LABEL: "gpu_spot", **spot["labels"]}
    running = [Node(f"10.0.1.{i}", {"CPU": 8.0, "GPU": 1.0}, labels) for i in range(spot["max_workers"])]
    found = Counter(node.name for node in may_come(config, [HEAD, *running]))
    assert found["type gpu"] == config["available_node_types"]["gpu"]["max_workers"] == 8
    assert "type gpu_spot" not in found
