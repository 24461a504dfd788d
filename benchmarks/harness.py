"""What all benchmarks share: running programs in turn, their time and peak memory, Markdown tables and result files.

Every measured program is a process of its own. Its last line on standard output is one JSON object: its own clock and counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.store.memory import tree_mb

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
# Llama 3.1 8B; the benchmarks on a GPU give it random weights.
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@dataclass
class Peaks:
    """Highest sizes while a program ran, MiB.

    Attributes:
        driver_mib: memory of the program's first process alone, without what it maps of Ray's object store.
        store_mib: pages of the object store that were ever written; it gives none back.
        tree_mib: the process with all its descendants; what they share counts once for each.
    """

    driver_mib: float = 0.0
    store_mib: float = 0.0
    tree_mib: float = 0.0

    def look(self, pid: int) -> None:
        """Raises psutil.Error or OSError where a process has ended meanwhile."""
        self.driver_mib = max(self.driver_mib, round(own_mib(pid), 1))
        self.tree_mib = max(self.tree_mib, round(tree_mb(pid), 1))
        self.store_mib = max(self.store_mib, round(_store_mib(pid), 2))


def own_mib(pid: int) -> float:
    """Memory of one process, without what it maps of Ray's object store. Raises OSError or KeyError where it has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    sizes = dict(line.split(":", 1) for line in status.splitlines())
    return sum(int(sizes[name].split()[0]) for name in ("RssAnon", "RssFile")) / 2**10


def _store_mib(pid: int) -> float:
    """Pages of a job's object store: of the file in shared memory that its raylet holds open."""
    for process in psutil.Process(pid).children(recursive=True):
        if process.name() == "raylet":
            for entry in Path(f"/proc/{process.pid}/fd").iterdir():
                if "/plasma" in os.readlink(entry):
                    return entry.stat().st_blocks * 512 / 2**20
    return 0.0


def watched(command: list[str]) -> tuple[float, Peaks, Row]:
    """Run a Python command: seconds, peaks (looked at four times a second), and the JSON object that it printed last."""
    began, peaks = time.monotonic(), Peaks()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output, env=environment())
        while process.poll() is None:
            with contextlib.suppress(psutil.Error, OSError, KeyError):  # a process may have ended meanwhile
                peaks.look(process.pid)
            time.sleep(0.25)
        seconds = time.monotonic() - began
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        output.seek(0)
        return seconds, peaks, _last_line(output.read())


def together(commands: list[list[str]], env: Mapping[str, str] | None = None) -> list[Row]:
    """Run Python commands at the same time; of each the JSON object that it printed last, empty for none."""
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment() | dict(env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    outputs = [process.communicate() for process in processes]
    for command, process, (output, error) in zip(commands, processes, outputs, strict=True):
        if process.returncode:
            raise SystemExit(
                f"{output[-2000:]}{error[-4000:].rstrip()}\n{' '.join(command)} ended with {process.returncode}"
            )
    return [_last_line(output) for output, _ in outputs]


def run(*command: str) -> Row:
    """`together` of one command."""
    return together([list(command)])[0]


def environment() -> dict[str, str]:
    """This process's environment with the package on the path, installed or not."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def _last_line(output: str) -> Row:
    last = output.strip().splitlines()[-1:]
    return json.loads(last[0]) if last and last[0].startswith("{") else {}


def in_turn(programs: Mapping[str, Callable[[], Row]], repeats: int, rate: str) -> list[Row]:
    """Run the programs A B A B ...; of each the run with the median `rate`, and "rates" of all its runs."""
    runs: dict[str, list[Row]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            runs[name].append(note({"program": name, **program()}))
    return [{**median_run(found, rate), "rates": [run[rate] for run in found]} for found in runs.values()]


def median_run(runs: list[Row], key: str) -> Row:
    """The run whose `key` is the median (the higher one of two)."""
    return sorted(runs, key=lambda run: run[key])[len(runs) // 2]


def note(row: Row) -> Row:
    """Show a result on standard error while the benchmark goes on."""
    print(row, file=sys.stderr, flush=True)
    return row


def print_table(rows: list[Row], columns: str = "") -> None:
    """Markdown. columns: "title {key:format} | title {key}"; a cell is empty where the row lacks a key. Default: all keys."""
    parts = columns.split("|") if columns else [f"{name} {{{name}}}" for name in rows[0]]
    titles = [part.partition("{")[0].strip() for part in parts]
    forms = ["{" + part.partition("{")[2].strip() for part in parts]
    frame = pd.DataFrame([[_cell(form, row) for form in forms] for row in rows], columns=titles)
    print(f"\n{frame.to_markdown(index=False, disable_numparse=True)}\n", flush=True)


def _cell(form: str, row: Row) -> str:
    try:
        return form.format_map(row)
    except KeyError:
        return ""


def write_results(target: Path, runs: list[Row]) -> None:
    """A JSON file with the runs and the machine that they ran on."""
    machine = {
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1))
    print(f"{machine}; results: {target}")


def run_parts(folder: Path, parts: Mapping[str, Callable[[Any], list[Row]]], names: str, bench: Any) -> None:
    """Each part prints a table and leaves a file of results; none needs another one's results. names: comma-separated."""
    for name in names.split(","):
        if name not in parts:
            raise SystemExit(f"unknown part '{name}'. Known: {', '.join(parts)}")
        folder.mkdir(parents=True, exist_ok=True)
        write_results(folder / f"{name}.json", parts[name](bench))


def manifest_of(recipe: list[str], name: str, round_id: int = 0) -> Manifest:
    """Of an artifact that a run wrote; recipe: its file, then overrides, run.root and run.name among them."""
    values = dict(override.split("=", 1) for override in recipe[1:])
    return RunDir(Path(values["run.root"]) / values["run.name"]).require(name, round_id)
