"""Whether the nodes of a cluster have the same dpo4rec_ray as the job that joins it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dpo4rec_ray.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
_ANSWER_S = 60.0


def check_nodes() -> None:
    """Ask every node that has CPUs now; one that does not answer in time is not judged.

    Raises:
        UserError: a node has other code. (One that lacks it raises Ray's own error: see cli/mistakes.py.)
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0)(code_version)
    asked = {
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(): node
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU")
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S) if asked else ([], [])
    for one in answered:
        if ray.get(one) != code_version():
            raise UserError(
                f"node {asked[one]['NodeManagerAddress']} has another version of dpo4rec_ray than this job; install the same on "
                "every node, or submit with ray job submit --working-dir"
            )


def code_version() -> str:
    """A hash of the package's Python files."""
    found = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        found.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()
