"""Architecture: who may import whom, every module imports on CPU, docs/architecture.md lists them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from tests.import_graph import (
    ARCHITECTURE,
    PACKAGE,
    ROOMS,
    ROOT,
    circles,
    import_graph,
    imported_names,
    modules,
    room_of,
    upward,
    with_files,
)

MODULES = modules()
SIBLINGS = ("datasets", "knowledge", "rerankers", "policy")
HEAVY = ("vllm", "deepspeed", "peft")
# Rooms that may import less than all that lies below them.
ALLOWED = {
    "core": ("core", "errors"),
    "models": ("models", "storage", "errors"),
    **{room: (room, "models", "core", "config", "storage", "errors") for room in SIBLINGS},
}
RAY_ROOMS = ("workers", "prepare", "texts", "train", "stages", "serving", "grid_search", "cli")


def top_level(tree: ast.Module) -> ast.Module:
    """The tree without function bodies and TYPE_CHECKING blocks: what runs when the module is imported."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST:
            return ast.Pass() if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(tree)


def broken_rules(module: str, source: str, is_package: bool = False) -> list[str]:
    """Every rule the module breaks, one line each."""
    part = room_of(module)
    found: list[str] = []
    for name, line in imported_names(ast.parse(source), module, is_package, MODULES):
        first, inside = name.partition(".")[0], room_of(name)
        if first == "jobs":
            found.append(f"{module}:{line} imports jobs; the package does not know its entry points")
        if first == "ray" and part not in RAY_ROOMS:
            found.append(f"{module}:{line} imports ray; only {', '.join(RAY_ROOMS)} may")
        if first == PACKAGE.name and inside:
            if part in ALLOWED and inside not in ALLOWED[part]:
                found.append(f"{module}:{line} imports {name}; {part} may import {', '.join(ALLOWED[part])}")
            elif ROOMS.index(inside) > ROOMS.index(part):
                found.append(f"{module}:{line} imports {name}; {inside} stands above {part}")
        if first == "torch" and part == "config":
            found.append(f"{module}:{line} imports torch; a recipe's typo must cost milliseconds")
    for name, line in imported_names(top_level(ast.parse(source)), module, is_package, MODULES):
        if name.partition(".")[0] in HEAVY:
            found.append(f"{module}:{line} imports {name} at module level; import it where it is used")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_import_rules(module: str) -> None:
    path = MODULES[module]
    assert broken_rules(module, path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dpo4rec_ray.core.metrics", "import ray"),
        ("dpo4rec_ray.core.metrics", "def f():\n    from ray import data"),
        ("dpo4rec_ray.pipeline", "import ray"),
        ("dpo4rec_ray.core.metrics", "from dpo4rec_ray.store.artifacts import RunDir"),
        ("dpo4rec_ray.policy.model", "import dpo4rec_ray.knowledge.prompts"),
        ("dpo4rec_ray.policy.model", "from dpo4rec_ray import checks"),
        ("dpo4rec_ray.config", "from dpo4rec_ray.core import keys"),
        ("dpo4rec_ray.store.reading", "from dpo4rec_ray.stages import prepare"),
        ("dpo4rec_ray.policy.model", "from ..knowledge import prompts"),
        ("dpo4rec_ray.policy.model", "import peft"),
        ("dpo4rec_ray.stages.train_policy", "try:\n    import deepspeed\nexcept ImportError:\n    pass"),
        ("dpo4rec_ray.knowledge.generator", "class A:\n    from vllm import LLM"),
        ("dpo4rec_ray.pipeline", "from jobs.run import main"),
        ("dpo4rec_ray.config", "import torch"),
    ],
)
def test_each_rule_can_fail(module: str, source: str) -> None:
    assert len(broken_rules(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dpo4rec_ray.stages.train_policy", "import ray\nfrom dpo4rec_ray.policy import model"),
        ("dpo4rec_ray.policy.model", "def f():\n    import peft\nfrom dpo4rec_ray.core import losses"),
        ("dpo4rec_ray.policy.model", "if TYPE_CHECKING:\n    import peft"),
        ("dpo4rec_ray.policy.model", "from . import batch\nfrom .batch import collate"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert broken_rules(module, source) == []


def test_all_modules_import_on_cpu() -> None:
    """In a fresh interpreter that sees no GPU, none of the engines is loaded by importing the package."""
    script = (
        f"import importlib, sys\nfor name in {list(MODULES)!r}: importlib.import_module(name)\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\nassert not loaded, loaded"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_room_is_listed() -> None:
    on_disk = {room_of(module) for module in MODULES} - {""}
    assert on_disk <= set(ROOMS), "add the room to tests/import_graph.py, above what it imports"


def test_no_circles_and_nothing_imports_upwards() -> None:
    graph = import_graph(MODULES)
    assert circles(graph) == []
    assert upward(graph) == []


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"f"}, "f": {"e"}}
    assert circles(graph) == [["a", "b", "c"], ["e", "f"]]


def test_no_two_modules_share_a_name() -> None:
    """A module and a room may: `stages.prepare` places what the room `prepare` holds."""
    names = Counter(
        module.rpartition(".")[2] for module, path in MODULES.items() if path.name != "__init__.py"
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_the_architecture_page_lists_every_room_and_file() -> None:
    """`python tests/import_graph.py --write` renews the list."""
    page = ARCHITECTURE.read_text(encoding="utf-8")
    assert with_files(page) == page
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(ROOMS)


def test_only_evaluate_reads_the_test_lists() -> None:
    """`"test"` stands where users and lists are split, where every user gets a text from the prompt history, in evaluate.

    `core/candidates` and `prepare/partition_lists` say who is tested; the study `drift` reads when test lists were.
    """
    named = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if '"test"' in path.read_text(encoding="utf-8")
    }
    splitting = {"core/candidates.py", "prepare/partition_lists.py"}
    assert named == {*splitting, "stages/encode.py", "stages/evaluate.py", "studies/drift.py"}
    unsplit = [path for path in PACKAGE.rglob("*.py") if 'store.read("lists")' in path.read_text()]
    assert unsplit == []
