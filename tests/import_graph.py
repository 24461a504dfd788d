"""The package's import graph: rooms, files, circles, imports that run upwards. `python tests/import_graph.py` prints it.

With --write it also renews the list of files in docs/architecture.md.

A room is a folder of the package, or a file beside it. Rooms are listed from the ground up; a room may import from the rooms
before it. Imports inside functions and under TYPE_CHECKING count as well.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Container, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dpo4rec_ray"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
START, END = "<!-- files -->", "<!-- /files -->"
ROOMS = (
    "errors",
    "storage",
    "config",
    "models",
    "core",
    "datasets",
    "knowledge",
    "rerankers",
    "policy",
    "store",
    "workers",
    "prepare",
    "texts",
    "train",
    "evaluation",
    "stages",
    "serving",
    "identity",
    "exchange",
    "checks",
    "report",
    "pipeline",
    "running",
    "run_status",
    "planning",
    "grid_search",
    "studies",
    "cli",
    "__main__",
)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imported_names(
    tree: ast.AST, module: str, is_package: bool, known: Container[str]
) -> Iterator[tuple[str, int]]:
    """Absolute names of the modules imported anywhere in the tree, with their lines. known: the package's modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, base]).rstrip(".")
            # `from a import b` takes the module a.b where there is one, else a name of a
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in known else base, node.lineno


def import_graph(known: Mapping[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports. A package's own __init__ counts as one module."""
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        is_package = path.name == "__init__.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {name for name, _ in imported_names(tree, module, is_package, known)}
        graph[module] = {name for name in names if name in known and name != module and name != PACKAGE.name}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a loop (Tarjan's strongly connected components of two or more)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group: list[str] = []
            while not group or group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def room_of(module: str) -> str:
    """`dpo4rec_ray.core.metrics` -> `core`; "" for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def upward(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports from a room to one that is listed after it."""
    floor = {room: place for place, room in enumerate(ROOMS)}
    return [
        f"{module} -> {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if room_of(module) and floor[room_of(module)] < floor[room_of(other)]
    ]


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def file_list() -> str:
    """Every file of the package by room, with the first line of its docstring, in Markdown."""
    found: list[str] = []
    for room in ROOMS:
        own = [path for module, path in modules().items() if room_of(module) == room]
        for path in own:
            summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
            if path.name != "__init__.py":
                found.append(f"- `{path.relative_to(PACKAGE).as_posix()}`: {summary}")
        found.append("")
    return "\n".join(found).strip()


def with_files(text: str) -> str:
    """docs/architecture.md with the present list of files."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{file_list()}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    if "--write" in sys.argv:
        ARCHITECTURE.write_text(with_files(ARCHITECTURE.read_text(encoding="utf-8")), encoding="utf-8")
    known = modules()
    graph = import_graph(known)
    sizes = {module: lines(path) for module, path in known.items() if path.name != "__init__.py"}
    print(f"{'room':<13}{'files':>6}{'lines':>7}  imports from")
    for room in ROOMS:
        own = [module for module in known if room_of(module) == room]
        below = {room_of(other) for module in own for other in graph[module]} - {room}
        counted = [lines(known[module]) for module in own]
        print(f"{room:<13}{len(own):>6}{sum(counted):>7}  {', '.join(sorted(below, key=ROOMS.index))}")
    total = sum(lines(path) for path in known.values())
    print(f"{'':<13}{len(known):>6}{total:>7}  median of a file {statistics.median(sizes.values()):.0f}")
    for folder in ("jobs", "benchmarks"):
        files = list((ROOT / folder).glob("*.py"))
        print(f"{folder + '/':<13}{len(files):>6}{sum(map(lines, files)):>7}")
    print(
        "over 400 lines:", ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 400) or "none"
    )
    print("circles:", circles(graph) or "none")
    print("upward imports:", upward(graph) or "none")


if __name__ == "__main__":
    main()
