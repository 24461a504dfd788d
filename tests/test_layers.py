"""Architecture: who may import whom, every module imports on CPU, the README's tree equals the disk."""

from __future__ import annotations

import ast
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dpo4rec_ray"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
SIBLINGS = ("datasets", "knowledge", "rerankers", "policy")
HEAVY = ("vllm", "deepspeed", "peft")
# Part of the package (first name below it; "" is the package itself) -> what it may import from the package.
ALLOWED = {
    "core": {"core", "errors"},
    **{part: {part, "core", "errors"} for part in SIBLINGS},
    "errors": set[str](),
    "config": {"errors"},
    "schemas": {"errors"},
    "artifacts": {"schemas", "errors"},
    "published": {"artifacts", "core", "errors"},
}


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Absolute names imported anywhere in the tree, type-checking blocks and functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, base]).rstrip(".")
            # `from dpo4rec_ray import core` names the module only in the alias
            yield from (
                (f"{base}.{alias.name}" if base == PACKAGE.name else base, node.lineno)
                for alias in node.names
            )


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
    part = module.partition(".")[2].partition(".")[0]
    found: list[str] = []
    for name, line in imports(ast.parse(source), module, is_package):
        first, _, rest = name.partition(".")
        inside = rest.partition(".")[0]
        if first == "jobs":
            found.append(f"{module}:{line} imports jobs; the package does not know its entry points")
        if first == "ray" and part not in ("stages", "serving"):
            found.append(f"{module}:{line} imports ray; only stages/, serving/ and jobs/ may")
        if first == PACKAGE.name and inside and part in ALLOWED and inside not in ALLOWED[part]:
            found.append(f"{module}:{line} imports {name}; {part} may import {sorted(ALLOWED[part])}")
        if first == "torch" and part in ("config", "schemas", "artifacts"):
            found.append(f"{module}:{line} imports torch; a recipe's typo must cost milliseconds")
    for name, line in imports(top_level(ast.parse(source)), module, is_package):
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
        ("dpo4rec_ray.core.metrics", "from dpo4rec_ray.artifacts import RunDir"),
        ("dpo4rec_ray.policy.model", "import dpo4rec_ray.knowledge.prompts"),
        ("dpo4rec_ray.policy.model", "from dpo4rec_ray import config"),
        ("dpo4rec_ray.policy.model", "from ..knowledge import prompts"),
        ("dpo4rec_ray.policy.model", "import peft"),
        ("dpo4rec_ray.stages.dpo", "try:\n    import deepspeed\nexcept ImportError:\n    pass"),
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
        ("dpo4rec_ray.stages.dpo", "import ray\nfrom dpo4rec_ray.policy import model"),
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


PATH = re.compile(r"Makefile|LICENSE|[\w.{},*/-]*(?:/|\.\w+|/\w+)")


def tree_paths(readme: str) -> set[str]:
    """Paths named by the README's folder tree: the ```text block that has a line beginning with `dpo4rec_ray/`.

    Two spaces of indent are one level below a line that names one folder. A line begins with paths, the later ones in
    the first one's folder, and goes on with words. `{a,b}` stands for alternatives.
    """
    for block in re.findall(r"^```text\n(.*?)^```", readme, re.MULTILINE | re.DOTALL):
        lines = [line for line in block.splitlines() if line.strip()]
        if not any(line.split()[0] == f"{PACKAGE.name}/" for line in lines):
            continue
        paths: set[str] = set()
        folders: dict[int, str] = {}
        for line in lines:
            depth = (len(line) - len(line.lstrip())) // 2
            folders = {level: folder for level, folder in folders.items() if level < depth}
            parent = folders[max(folders)] if folders else ""
            tokens = list(itertools.takewhile(PATH.fullmatch, line.split()))
            for place, token in enumerate(tokens):
                beside = tokens[0].rpartition("/")[0] + "/" if place and "/" in tokens[0].rstrip("/") else ""
                before, _, rest = token.partition("{")
                inner, _, after = rest.partition("}")
                paths.update(parent + beside + before + name + after for name in inner.split(","))
            if len(tokens) == 1 and tokens[0].endswith("/"):
                folders[depth] = parent + tokens[0]
        return paths
    pytest.fail(f"README.md has no ```text block with a line that begins with {PACKAGE.name}/")


def test_readme_tree_equals_the_disk() -> None:
    paths = tree_paths((ROOT / "README.md").read_text(encoding="utf-8"))
    made_by_runs = {path for path in paths if path.startswith("runs/")}
    missing = sorted(path for path in paths - made_by_runs if not list(ROOT.glob(path.rstrip("/"))))
    assert missing == [], "named in README.md's tree, but not on disk"
    on_disk = {str(path.relative_to(ROOT)) for path in MODULES.values() if path.name != "__init__.py"}
    assert sorted(on_disk - paths) == [], "on disk, but not in README.md's tree"


def test_the_tree_reader() -> None:
    readme = (
        "```text\nother block\n```\n```text\nREADME.md  Makefile  .ci/run  what it is\njobs/run.py  serve.py   run it\n"
        "dpo4rec_ray/\n  pipeline.py  first, a/b\n  core/  pure\n    {metrics,losses}.py\n  policy/model.py  batch.py\n"
        "tests/unit/  fast\n```\n"
    )
    assert tree_paths(readme) == {
        "README.md", "Makefile", ".ci/run", "jobs/run.py", "jobs/serve.py", "dpo4rec_ray/", "dpo4rec_ray/pipeline.py",
        "dpo4rec_ray/core/",
        "dpo4rec_ray/core/metrics.py", "dpo4rec_ray/core/losses.py", "dpo4rec_ray/policy/model.py",
        "dpo4rec_ray/policy/batch.py", "tests/unit/",
    }  # fmt: skip


def test_only_evaluate_reads_the_test_lists() -> None:
    """`"test"` stands where users and lists are split, where every user gets a text from the prompt history, in evaluate.

    `core/candidates` and `stages/partitions` say who is tested, `datasets/logged` which splits a log may name.
    """
    named = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if '"test"' in path.read_text(encoding="utf-8")
    }
    splitting = {"core/candidates.py", "stages/partitions.py", "datasets/logged.py"}
    assert named == {*splitting, "stages/encode.py", "stages/evaluate.py"}
    unsplit = [
        path for path in (PACKAGE / "stages").glob("*.py") if 'store.read("lists")' in path.read_text()
    ]
    assert unsplit == []
