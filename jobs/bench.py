"""Measure a stage against its peer in the same run: python jobs/bench.py prepare|score [--help].

Prints a Markdown table and writes the figures as JSON. Every measured program is a process of its own; memory is the
summed resident size of its whole process tree, sampled four times a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dpo4rec_ray.memory import tree_mb

ROOT = Path(__file__).resolve().parents[1]
PAPER_REVIEWS = 1_410_000  # Amazon-Books as the paper uses it
FULL_REVIEWS, FULL_SIZE = 51_311_621, 36  # the whole of it, as a multiple of that


@dataclass
class Measured:
    """One run of one program."""

    program: str
    data: str
    rows: int
    wall_s: float
    work_s: float  # without starting Python, Ray and imports, by the program's own clock
    peak_mib: float
    figures: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(prog="jobs/bench.py", description="Measure a stage against its peer.")
    stages = parser.add_subparsers(dest="stage", required=True)
    prepare = stages.add_parser("prepare", help="raw Amazon reviews to candidate lists, against pandas")
    prepare.add_argument("--folder", default="runs/bench", help="for raw files and results")
    prepare.add_argument(
        "--sizes", default="1,4,16,36", help=f"multiples of {PAPER_REVIEWS:,} reviews; 36: all 51 M"
    )
    prepare.add_argument("--peer-sizes", default="1,4", help="those that pandas does too")
    prepare.add_argument("--layout", choices=("json.gz", "csv"), default="json.gz")
    prepare.add_argument("--repeats", type=int, default=1, help="of every run; the median is shown")
    prepare.add_argument("--seed", type=int, default=0)
    score = stages.add_parser("score", help="rewards of 10,000 texts, against a plain loop over lists")
    score.add_argument("--folder", default="runs/bench", help="for the inputs and the results")
    score.add_argument("--backbones", default="dlcm,prm,setrank,mir")
    score.add_argument("--users", type=int, default=1000)
    options = parser.parse_args()
    return bench_score(options) if options.stage == "score" else bench_prepare(options)


def bench_prepare(options: argparse.Namespace) -> int:
    folder = Path(options.folder)
    sizes = [int(size) for size in options.sizes.split(",") if size]
    peers = {int(size) for size in options.peer_sizes.split(",") if size}
    found: list[Measured] = []
    raw = make_raw(folder, "amazon-books-core", PAPER_REVIEWS, options)
    found += [
        run_ours(raw, "paper size", PAPER_REVIEWS, options),
        run_pandas(raw, "paper size", PAPER_REVIEWS, options),
    ]
    for size in sizes:
        rows = FULL_REVIEWS if size == FULL_SIZE else size * PAPER_REVIEWS
        raw = make_raw(folder, "amazon-books", rows, options)
        found.append(run_ours(raw, f"{size}x", rows, options))
        if size in peers:
            found.append(run_pandas(raw, f"{size}x", rows, options))
    print(table_of(found))
    write_figures(folder / "prepare.json", [asdict(one) for one in found])
    return check_agreement(found)


def bench_score(options: argparse.Namespace) -> int:
    """One process per backbone; each checks that loop and stage find the same rewards."""
    folder = Path(options.folder).resolve()
    found: list[dict[str, Any]] = []
    for backbone in options.backbones.split(","):
        command = ["jobs/bench_score.py", str(folder / "score"), "--backbone", backbone]
        _, peak_mib, output = watched([*command, "--users", str(options.users)])
        found.append({**json.loads(output.strip().splitlines()[-1]), "peak_mib": round(peak_mib)})
    print(
        "| backbone | lists | lists/s | loop, lists/s | ratio | stage s | in the encoder | in the forward pass | of the stage "
        "| 20 metrics of 100,000 lists, s | peak MiB |\n" + "|---" * 11 + "|"
    )
    for row in found:
        print(
            f"| {row['backbone']} | {row['lists']:,} | {row['ours_lists_per_s']:,} | {row['loop_lists_per_s']:,} | "
            f"{row['ratio']} | {row['stage_s']} | {row['encoder_s']} | {row['forward_s']} | "
            f"{row['share in encoder and forward']:.1%} | {row['metrics_s']} | {row['peak_mib']:,} |"
        )
    write_figures(folder / "score.json", found)
    return 0


def write_figures(target: Path, runs: list[dict[str, Any]]) -> None:
    machine = {
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
    }
    target.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1))
    print(f"\n{machine}; figures: {target}")


def make_raw(folder: Path, like: str, rows: int, options: argparse.Namespace) -> Path:
    """Synthetic raw files of the published shape, made once."""
    raw = folder / f"{like}-{rows}-{options.layout}-{options.seed}"
    if not (raw / "done").exists():
        command = [
            "-m",
            "dpo4rec_ray.datasets.sample",
            "--like",
            like,
            str(raw),
            "--reviews",
            str(rows),
            "--force",
        ]
        command += ["--layout", options.layout, "--seed", str(options.seed), "--processes", "2"]
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
        (raw / "done").touch()
    return raw


def run_ours(raw: Path, data: str, rows: int, options: argparse.Namespace) -> Measured:
    root = Path(options.folder).resolve() / "run"
    overrides = [f"data.raw_dir={raw.resolve()}", f"run.root={root}", f"run.seed={options.seed}"]
    command = ["jobs/run.py", "jobs/recipes/amazon_books.toml", "--only", "prepare", *overrides]

    def work(_: str) -> tuple[float, dict[str, Any]]:
        manifest = json.loads((root / "amazon_books/data/lists/manifest.json").read_text())
        return manifest["seconds"], {
            name: manifest["figures"][name] for name in ("users", "items", "events", "lists")
        }

    return median(work, command, "dpo4rec_ray", data, rows, options.repeats)


def run_pandas(raw: Path, data: str, rows: int, options: argparse.Namespace) -> Measured:
    target = Path(options.folder).resolve() / "pandas"
    command = [
        "jobs/bench_prepare.py",
        str(raw.resolve()),
        str(target),
        "--user-core",
        "60",
        "--item-core",
        "40",
    ]

    def work(output: str) -> tuple[float, dict[str, Any]]:
        answer = json.loads(output.strip().splitlines()[-1])
        return answer["seconds"], {name: answer[name] for name in ("users", "items", "events", "lists")}

    return median(work, command, "pandas", data, rows, options.repeats)


def median(
    work: Callable[[str], tuple[float, dict[str, Any]]],
    command: list[str],
    program: str,
    data: str,
    rows: int,
    repeats: int,
) -> Measured:
    """Run the command `repeats` times; the run with the median time. `work` reads its clock and figures from its output."""
    runs = []
    for _ in range(repeats):
        wall_s, peak_mib, output = watched(command)
        work_s, figures = work(output)
        runs.append(
            Measured(program, data, rows, round(wall_s, 1), round(work_s, 1), round(peak_mib), figures)
        )
        print(f"{program}, {data}: {work_s:.1f} s, peak {peak_mib:.0f} MiB", file=sys.stderr, flush=True)
    return sorted(runs, key=lambda one: one.work_s)[len(runs) // 2]


def watched(command: list[str]) -> tuple[float, float, str]:
    """Run a Python command: seconds, peak MiB of its process tree, standard output."""
    started, peak = time.monotonic(), 0.0
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
            peak = max(peak, tree_mb(process.pid))
        time.sleep(0.25)
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - started, peak, output


def table_of(found: list[Measured]) -> str:
    """Markdown. Growth: seconds per row beside those of the smallest size of the same program, 1.00 is linear."""
    lines = [
        "| data | program | reviews | seconds | wall | peak MiB | reviews/s | per review, 1x = 1 "
        "| users, items, events, lists |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        base = next(
            (other for other in found if other.program == one.program and other.data.endswith("x")), one
        )
        growth = (
            "" if not one.data.endswith("x") else f"{one.work_s / one.rows / (base.work_s / base.rows):.2f}"
        )
        shape = ", ".join(f"{one.figures[name]:,}" for name in ("users", "items", "events", "lists"))
        lines.append(
            f"| {one.data} | {one.program} | {one.rows:,} | {one.work_s} | {one.wall_s} | {one.peak_mib:,.0f} | "
            f"{one.rows / one.work_s:,.0f} | {growth} | {shape} |"
        )
    return "\n".join(lines)


def check_agreement(found: list[Measured]) -> int:
    """Both programs must have made the same users, items, events and lists."""
    for one in found:
        for other in found:
            if one.data == other.data and one.figures != other.figures:
                print(
                    f"{one.data}: {one.program} and {other.program} disagree: {one.figures}, {other.figures}",
                    file=sys.stderr,
                )
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
