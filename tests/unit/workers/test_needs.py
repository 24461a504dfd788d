"""A section's placement as Ray takes it."""

from __future__ import annotations

from dpo4rec_ray.config import default_config
from dpo4rec_ray.config.placed import Placed
from dpo4rec_ray.workers.needs import GIB, Groups, Needs

WHERE = [
    "generate.accelerator_type=A10G",
    "generate.label_selector.zone=in(a, b)",
    "generate.resources.disk=0.5",
    "generate.memory_gib=2",
]


def test_without_keys_only_cpus_and_gpus_are_asked_for() -> None:
    assert Needs.of(Placed(), 0.5, 0.25).options() == {"num_cpus": 0.5, "num_gpus": 0.25}
    assert Needs.of(None, 1).bundles() == [{"CPU": 1}]


def test_every_key_reaches_ray() -> None:
    needs = Needs.of(default_config([*WHERE, "generate.placement_strategy=PACK"]).generate, 4, 1)
    assert needs.options() == {
        "num_cpus": 4,
        "num_gpus": 1,
        "memory": 2 * GIB,
        "resources": {"disk": 0.5, "accelerator_type:A10G": 0.001},
        "label_selector": {"zone": "in(a, b)"},
        "scheduling_strategy": "DEFAULT",
    }
    assert needs.bundles() == [
        {"CPU": 4, "GPU": 1, "memory": 2 * GIB, "disk": 0.5, "accelerator_type:A10G": 0.001}
    ]
    assert Needs.of(Placed(placement_strategy="SPREAD"), 1).options()["scheduling_strategy"] == "SPREAD"


def test_an_engine_over_several_nodes_has_a_bundle_per_gpu() -> None:
    """The CPUs are where the engine's actor is; vLLM's own workers take the GPUs of the bundles."""
    needs = Needs.of(Placed(accelerator_type="H100"), 2, 4, over_nodes=True)
    assert needs.options() == {"num_cpus": 2, "num_gpus": 0}
    one = {"GPU": 1, "accelerator_type:H100": 0.001}
    assert needs.bundles() == [{"CPU": 2, **one}, one, one, one]
    assert Groups().option(needs) is not None
    assert Groups().option(Needs(2, 4)) is None
