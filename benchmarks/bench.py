"""Measure a stage against its peer in the same run: python benchmarks/bench.py prepare|score|generate|dpo|serve [--help].

Prints a Markdown table and writes the figures as JSON. Every measured program is a process of its own; memory is the
summed resident size of its whole process tree, sampled four times a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dpo
import psutil
import serve

from dpo4rec_ray.config.texts import GenerateSection, LLMSection
from dpo4rec_ray.knowledge.engine_spec import EngineSpec, ServedWeights
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.store.memory import tree_mb

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
    stats: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/bench.py", description="Measure a stage against its peer."
    )
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
    generate = stages.add_parser("generate", help="samples per second, against vLLM and transformers alone")
    generate.add_argument("--folder", default="runs/bench", help="for users, models and results")
    generate.add_argument("--parts", default=",".join(GENERATE_PARTS), help="each writes its own figures")
    generate.add_argument("--gpu", action="store_true", help="an 8B-shaped LLM on one GPU; only `steady`")
    generate.add_argument(
        "--repeats", type=int, default=3, help="of stage and peer in turn; medians are shown"
    )
    generate.add_argument(
        "--size", type=float, default=1.0, help="of all inputs; 0.05 shows that everything runs"
    )
    generate.add_argument(
        "--simulated", default="100000,1000000", help="users that `simulated` writes template texts for"
    )
    dpo = stages.add_parser("dpo", help="pairs per second and first steps, against TRL's DPOTrainer")
    dpo.add_argument("--folder", default="runs/bench", help="for models, pairs and results")
    dpo.add_argument("--parts", default=",".join(dpo.PARTS), help="each writes its own figures")
    dpo.add_argument("--repeats", type=int, default=3, help="of peer and trainer in turn; medians are shown")
    dpo.add_argument(
        "--steps", type=int, default=8, help="optimiser steps of 8 pairs that are timed, plus one"
    )
    dpo.add_argument("--gpu", action="store_true", help="instead: an 8B-shaped Llama on one GPU")
    serve = stages.add_parser(
        "serve", help="requests per second, against a no-op deployment and bare FastAPI"
    )
    serve.add_argument("--folder", default="runs/bench", help="for the served run and results")
    serve.add_argument("--parts", default=",".join(serve.PARTS), help="each writes its own figures")
    serve.add_argument("--repeats", type=int, default=3, help="of all servers in turn; medians are shown")
    serve.add_argument("--seconds", type=float, default=10, help="of every measurement")
    serve.add_argument("--minutes", type=float, default=10, help="of the part `soak`")
    options = parser.parse_args()
    stage = {
        "prepare": bench_prepare,
        "score": bench_score,
        "generate": bench_generate,
        "dpo": bench_training,
        "serve": bench_serving,
    }
    return stage[options.stage](options)


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
        command = ["benchmarks/score.py", str(folder / "score"), "--backbone", backbone]
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


def bench_training(options: argparse.Namespace) -> int:
    """Every part of benchmarks/dpo.py that is asked for."""
    folder = Path(options.folder).resolve() / "dpo"
    folder.mkdir(parents=True, exist_ok=True)
    bench = dpo.Bench(folder, options.repeats, options.steps + 1, "8b" if options.gpu else "11m")
    if options.gpu:
        write_figures(folder / "gpu.json", dpo.gpu(bench))
        return 0
    for part in options.parts.split(","):
        write_figures(folder / f"{part}.json", dpo.PARTS[part](bench))
    return 0


def bench_serving(options: argparse.Namespace) -> int:
    """Every part of benchmarks/serve.py that is asked for."""
    folder = Path(options.folder).resolve() / "serve"
    folder.mkdir(parents=True, exist_ok=True)
    bench = serve.Bench(folder, options.seconds, options.repeats, options.minutes)
    for part in options.parts.split(","):
        write_figures(folder / f"{part}.json", serve.PARTS[part](bench))
    return 0


@dataclass
class Bench:
    """What the parts of `generate` share: where things are, and how the stage and its peers are run."""

    folder: Path
    repeats: int
    size: float
    gpu: bool

    def model(self, shape: str, stop: str = "never") -> Path:
        """Folder of a random LLM, made once."""
        folder = self.folder / f"llm-{shape}-{stop}"
        if not (folder / "generation_config.json").exists():
            last_line(["benchmarks/generate.py", "model", str(folder), "--shape", shape, "--stop", stop])
        return folder

    def recipe(self, model: Path, users: int, max_new_tokens: int, *more: str) -> list[str]:
        """Recipe and overrides of a run with about so many users; they are prepared once per number."""
        count = max(40, round(users * self.size))
        name = f"{'gpu-' if self.gpu else ''}users-{count}"
        common = [
            "jobs/recipes/demo.toml",
            f"run.root={self.folder}",
            f"run.name={name}",
            f"sample.num_users={round(count / 0.9)}",  # a tenth is for testing and gets no samples
        ]
        store = RunDir(self.folder / name)
        if self.gpu and store.manifest("users") is None:
            synthetic = ["--users", str(count), "--events", str(GPU_EVENTS)]
            last_line(["benchmarks/generate.py", "users", str(store.root), *synthetic])
        elif not self.gpu and store.manifest("lists") is None:
            last_line(["jobs/run.py", *common, "--only", "prepare"])
        return [
            *common,
            f"llm.path={model}",
            f"generate.max_new_tokens={max_new_tokens}",
            "generate.num_samples=10",
            "generate.num_engines=1",
            "generate.cpus_per_engine=1",
            *(GPU_ENGINE if self.gpu else []),
            *more,
        ]

    def stage(self, recipe: list[str]) -> tuple[dict[str, Any], Peaks]:
        """Run the stage. Its rate is by the engines' own clocks, from first request to last answer."""
        _, peaks = watched_parts(["jobs/run.py", *recipe, "--only", "generate"])
        stats = manifest_of(recipe).stats
        engines = list(stats["this_run"]["engines"].values())
        span_s = max(engine["span_s"] for engine in engines)
        return {
            "tokens": stats["tokens"],
            "samples": stats["samples"],
            "seconds": round(span_s, 2),
            "tokens_per_s": round(stats["tokens"] / span_s, 1),
            "start_s": max(engine["start_s"] for engine in engines),
            "busy": engines[0]["busy"],
            "running": engines[0]["running"],
            "failed": stats["failed"],
        }, peaks

    def vllm(self, recipe: list[str], *flags: str) -> dict[str, Any]:
        return last_line(["benchmarks/generate.py", "vllm", *recipe, *flags])

    def transformers(self, recipe: list[str], users: int) -> dict[str, Any]:
        users = max(8, round(users * self.size))
        return last_line(["benchmarks/generate.py", "transformers", *recipe, "--users", str(users)])


def bench_generate(options: argparse.Namespace) -> int:
    """Every part is a table and a file of figures; none needs another one's results."""
    folder = Path(options.folder).resolve() / "generate"
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, options.repeats, options.size, options.gpu)
    for part in ["steady"] if options.gpu else options.parts.split(","):
        began = time.monotonic()
        if part == "simulated":
            found = bench_simulated(bench, [int(number) for number in options.simulated.split(",")])
        else:
            found = GENERATE_PARTS[part](bench)
        write_figures(folder / f"{'gpu-' if options.gpu else ''}{part}.json", found)
        print(f"{part}: {time.monotonic() - began:.0f} s\n", flush=True)
    return 0


def bench_steady(bench: Bench) -> list[dict[str, Any]]:
    """Equal lengths: the stage, the same requests in one call of LLM.generate, and transformers."""
    found: list[dict[str, Any]] = []
    cases = [("8b", 2000, 256)] if bench.gpu else [("4m", 600, 64), ("bundled", 1600, 48)]
    for shape, users, max_new_tokens in cases:
        recipe = bench.recipe(bench.model(shape), users, max_new_tokens)
        programs: dict[str, Callable[[], dict[str, Any]]] = {
            "stage": lambda recipe=recipe: bench.stage(recipe)[0],
            "LLM.generate": lambda recipe=recipe: bench.vllm(recipe, "--compare"),
        }
        rows = in_turn(programs, bench.repeats)
        if not bench.gpu:
            rows.append({"program": "vLLM's defaults", **bench.vllm(recipe, "--drop", OURS, "--no-seeds")})
            rows.append({"program": "transformers", **bench.transformers(recipe, 32)})
        found += [{"llm": shape, **row} for row in rows]
    print_rates(found)
    return found


def bench_varying(bench: Bench) -> list[dict[str, Any]]:
    """Lengths from 1 to 256: the stage, LLM.generate called shard by shard, and one call with everything."""
    recipe = bench.recipe(bench.model("4m", "often"), 1000, 256, "llm.max_model_len=512")
    programs: dict[str, Callable[[], dict[str, Any]]] = {
        "stage": lambda: bench.stage(recipe)[0],
        "LLM.generate, shard by shard": lambda: bench.vllm(recipe, "--calls", "shard", "--compare"),
        "LLM.generate, one call": lambda: bench.vllm(recipe, "--compare"),
    }
    found = [{"llm": "4m, many EOS", **row} for row in in_turn(programs, bench.repeats)]
    print_rates(found)
    return found


def in_turn(programs: dict[str, Callable[[], dict[str, Any]]], repeats: int) -> list[dict[str, Any]]:
    """Run the programs A B A B ...; of each the run with the median rate, with all its rates."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            runs[name].append(program())
            print(f"{name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = []
    for name, found in runs.items():
        middle = sorted(found, key=lambda run: run["tokens_per_s"])[len(found) // 2]
        rows.append({"program": name, **middle, "rates": [run["tokens_per_s"] for run in found]})
    return rows


def print_rates(found: list[dict[str, Any]]) -> None:
    """Markdown; the last column is the stage's rate over that of each program."""
    print(
        "| LLM | program | samples | tokens | seconds | tokens/s, median | all runs | same samples as the stage "
        "| stage / this |\n" + "|---" * 9 + "|"
    )
    for row in found:
        stage = next(one for one in found if one["llm"] == row["llm"] and one["program"] == "stage")
        samples = row.get("samples") or row["users"] * 10
        same = f"{row['same_samples']:.1%}" if "same_samples" in row else ""
        rates = ", ".join(f"{rate:,.0f}" for rate in row.get("rates", []))
        print(
            f"| {row['llm']} | {row['program']} | {samples:,} | {row['tokens']:,} | {row['seconds']} | "
            f"{row['tokens_per_s']:,.0f} | {rates} | {same} | {stage['tokens_per_s'] / row['tokens_per_s']:.2f} |"
        )


def bench_settings(bench: Bench) -> list[dict[str, Any]]:
    """What each setting of the CPU engine is worth: LLM.generate in as many processes as there are engines."""
    no_seeds = [
        "--no-seeds"
    ]  # with seeds, chunked prefill ends the CPU engine: its generators know no offset
    cases: list[tuple[str, int, int, dict[str, Any], list[str]]] = [
        ("as the stage sets them", 1, 1, {}, []),
        ("2 threads", 1, 2, {}, []),
        ("2 engines", 2, 1, {}, []),
        ("2 engines, 2 threads each", 2, 2, {}, []),
        *((f"max_num_seqs {count}", 1, 1, {"max_num_seqs": count}, []) for count in (32, 128, 512)),
        *((f"block_size {size}", 1, 1, {"block_size": size}, []) for size in (64, 128)),  # 32 is the least
        ("without seeds", 1, 1, {}, no_seeds),
        ("without seeds, chunked prefill", 1, 1, {"enable_chunked_prefill": True}, no_seeds),
        ("compiled", 1, 1, {"enforce_eager": False}, []),
        ("KV cache 2 GiB", 1, 1, {}, ["generate.kv_cache_gib=2"]),
        ("as the stage sets them, again", 1, 1, {}, []),
    ]
    recipe = bench.recipe(bench.model("4m"), 150, 64)
    found: list[dict[str, Any]] = []
    for name, engines, threads, arguments, more in cases:
        flags = [*more, "--threads", str(threads), "--engine-args", json.dumps(arguments)]
        found.append({"setting": name, **side_by_side(recipe, engines, flags)})
        print(found[-1], file=sys.stderr, flush=True)
    print("| setting | tokens/s | beside the first | start s | MiB |\n" + "|---" * 5 + "|")
    for row in found:
        share = row["tokens_per_s"] / found[0]["tokens_per_s"]
        print(
            f"| {row['setting']} | {row['tokens_per_s']:,.0f} | {share:.2f} | {row['start_s']} | {row['rss_mib']:,} |"
        )
    return found


def side_by_side(recipe: list[str], engines: int, flags: list[str]) -> dict[str, Any]:
    """LLM.generate in several processes that begin together, each with its share of the users."""
    command = [sys.executable, "benchmarks/generate.py", "vllm", *recipe, *flags]
    with tempfile.TemporaryDirectory() as gate:
        processes = [
            subprocess.Popen(
                [*command, "--part", f"{index}/{engines}", "--gate", gate],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for index in range(engines)
        ]
        outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"generate.py vllm {' '.join(flags)} failed; run it alone to see why")
    rows = [json.loads(output.strip().splitlines()[-1]) for output in outputs]
    seconds = max(row["seconds"] for row in rows)
    tokens = sum(row["tokens"] for row in rows)
    return {
        "engines": engines,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": round(tokens / seconds, 1),
        "start_s": max(row["start_s"] for row in rows),
        "rss_mib": sum(row["rss_mib"] for row in rows),
    }


def bench_start(bench: Bench) -> list[dict[str, Any]]:
    """Seconds until the first token, one change after the other; the KV cache has 1 GiB throughout."""
    weights = ServedWeights(str(bench.model("4m")))
    ours = EngineSpec(weights, LLMSection(max_model_len=320), GenerateSection()).arguments()
    plain = {name: ours[name] for name in ("model", "dtype", "max_model_len")}
    cache = bench.folder / "vllm-cache"
    cached = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CACHE_ROOT": str(cache)}
    one_process = {**cached, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    unbound = {**one_process, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    eager = {**plain, "enforce_eager": True}
    cases: list[tuple[str, dict[str, str], dict[str, Any]]] = [
        ("vLLM's defaults, never compiled before", cached, plain),
        ("+ enforce_eager", cached, eager),
        ("+ one process", one_process, eager),
        ("+ nobind, one thread", unbound, eager),
        ("+ the other arguments: as the stage starts it", unbound, ours),
    ]
    last_line(
        ["benchmarks/engine_start.py", json.dumps(unbound), json.dumps(ours)]
    )  # what it reads is in memory now
    found: list[dict[str, Any]] = []
    for name, env, arguments in cases:
        runs: list[dict[str, Any]] = []
        for _ in range(bench.repeats):
            shutil.rmtree(cache / "torch_compile_cache", ignore_errors=True)
            runs.append(last_line(["benchmarks/engine_start.py", json.dumps(env), json.dumps(arguments)]))
        found.append({"start": name, **sorted(runs, key=lambda run: run["all"])[len(runs) // 2]})
        print(found[-1], file=sys.stderr, flush=True)
    phases = list(found[0])[1:]
    print(f"| seconds | {' | '.join(phases)} | cut by |\n" + "|---" * (len(phases) + 2) + "|")
    for before, row in zip([found[0], *found], found, strict=False):
        cells = " | ".join(f"{row[phase]:.1f}" for phase in phases)
        print(f"| {row['start']} | {cells} | {before['all'] - row['all']:.1f} |")
    return found


def bench_scale(bench: Bench) -> list[dict[str, Any]]:
    """The stage on 1x and 10x as many users: time must grow with them, the driver and the object store must not."""
    found: list[dict[str, Any]] = []
    for times in (1, 10):
        stats, peaks = bench.stage(bench.recipe(bench.model("4m"), 250 * times, 64))
        found.append({"users": f"{times}x", **stats, **asdict(peaks)})
    print(
        "| users | samples | seconds | tokens/s | driver MiB | object store MiB | whole tree MiB |\n"
        + "|---" * 7
        + "|"
    )
    for row in found:
        print(
            f"| {row['users']} | {row['samples']:,} | {row['seconds']} | {row['tokens_per_s']:,.0f} | "
            f"{row['driver_mib']:,.0f} | {row['store_mib']:,.2f} | {row['tree_mib']:,.0f} |"
        )
    one, ten = found
    memory = [row["driver_mib"] + row["store_mib"] for row in found]
    print(
        f"\n10x / 1x: time {ten['seconds'] / one['seconds']:.2f}, driver and store {memory[1] / memory[0]:.2f}"
    )
    return found


def bench_simulated(bench: Bench, sizes: list[int]) -> list[dict[str, Any]]:
    """Simulated texts (llm.source = "template", no LLM) of many users through the stage, two workers."""
    found: list[dict[str, Any]] = []
    for users in sizes:
        recipe = [
            "jobs/recipes/demo.toml",
            f"run.root={bench.folder}",
            f"run.name=simulated-{users}",
            "llm.source=template",
            "generate.num_samples=2",
            "generate.users_per_shard=10000",
            "generate.num_engines=2",
            "generate.cpus_per_engine=1",
        ]
        store = RunDir(bench.folder / f"simulated-{users}")
        if store.manifest("users") is None:
            last_line(["benchmarks/generate.py", "users", str(store.root), "--users", str(users)])
        wall_s, peaks = watched_parts(["jobs/run.py", *recipe, "--only", "generate"])
        manifest = manifest_of(recipe)
        row = {"users": users, "rows": manifest.rows, "wall_s": round(wall_s, 1), "seconds": manifest.seconds}
        row |= {
            f"{name}_mib": folder_mib(store.path(name, int(name != "users")))
            for name in ("users", "generations")
        }
        found.append({**row, **asdict(peaks)})
        print(found[-1], file=sys.stderr, flush=True)
    print(
        "| simulated users | texts | stage s | users/s | driver MiB | object store MiB | whole tree MiB | users on disk MiB "
        "| texts on disk MiB |\n" + "|---" * 9 + "|"
    )
    for row in found:
        print(
            f"| {row['users']:,} | {row['rows']:,} | {row['seconds']:,} | {row['users'] / row['seconds']:,.0f} | "
            f"{row['driver_mib']:,.0f} | {row['store_mib']:,.2f} | {row['tree_mib']:,.0f} | {row['users_mib']:,.0f} | "
            f"{row['generations_mib']:,.0f} |"
        )
    return found


# Part of `generate` -> what runs it; `simulated` also takes its sizes.
GENERATE_PARTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "steady": bench_steady,
    "varying": bench_varying,
    "settings": bench_settings,
    "start": bench_start,
    "scale": bench_scale,
    "simulated": bench_simulated,
}
# Engine arguments that the stage sets and vLLM has other defaults for; enforce_eager is measured under `settings`.
OURS = "block_size,enable_chunked_prefill,max_num_batched_tokens,max_num_seqs"
GPU_EVENTS = (
    30  # of every synthetic user: prompts of about 600 tokens (histories of the sample world are shorter)
)
GPU_ENGINE = [
    "generate.gpus_per_engine=1",
    'generate.engine_args.load_format="dummy"',
    "llm.dtype=bfloat16",
    "llm.max_model_len=1024",
    "prompt.factors=movies",
]


def manifest_of(recipe: list[str]) -> Manifest:
    """Of the generations that a recipe with overrides has written."""
    values = dict(override.split("=", 1) for override in recipe[1:])
    return RunDir(Path(values["run.root"]) / values["run.name"]).require("generations", 1)


def folder_mib(folder: Path) -> float:
    return round(sum(file.stat().st_size for file in folder.rglob("*.parquet")) / 2**20, 1)


def last_line(command: list[str]) -> dict[str, Any]:
    """Run a Python command; the JSON object that it prints last, or nothing."""
    process = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{process.stderr[-2000:]}\n{' '.join(command)} ended with {process.returncode}")
    last = process.stdout.strip().splitlines()[-1:]
    return json.loads(last[0]) if last and last[0].startswith("{") else {}


@dataclass
class Peaks:
    """Highest sizes while a job ran, MiB.

    Attributes:
        driver_mib: memory of the driver's process alone, without what it maps of the object store.
        store_mib: pages of the object store that were ever written; it gives none back.
        tree_mib: driver, Ray and workers; what they share counts once for each.
    """

    driver_mib: float = 0.0
    store_mib: float = 0.0
    tree_mib: float = 0.0

    def look(self, pid: int) -> None:
        """Raises psutil.Error or OSError where a process has ended meanwhile."""
        status = Path(f"/proc/{pid}/status").read_text()
        sizes = dict(line.split(":", 1) for line in status.splitlines())
        own_kib = sum(int(sizes[name].split()[0]) for name in ("RssAnon", "RssFile"))
        self.driver_mib = max(self.driver_mib, round(own_kib / 2**10, 1))
        self.tree_mib = max(self.tree_mib, round(tree_mb(pid), 1))
        self.store_mib = max(self.store_mib, round(store_mib(pid), 2))


def store_mib(pid: int) -> float:
    """Pages of the object store of a job: of the file in shared memory that its raylet holds open."""
    for process in psutil.Process(pid).children(recursive=True):
        if process.name() == "raylet":
            for entry in Path(f"/proc/{process.pid}/fd").iterdir():
                if "/plasma" in os.readlink(entry):
                    return entry.stat().st_blocks * 512 / 2**20
    return 0.0


def watched_parts(command: list[str]) -> tuple[float, Peaks]:
    """Run a Ray job: seconds and peaks."""
    started, peaks = time.monotonic(), Peaks()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error, OSError, KeyError):  # a process may have ended meanwhile
            peaks.look(process.pid)
        time.sleep(0.25)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - started, peaks


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
            "dpo4rec_ray.datasets.write_sample",
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
            name: manifest["stats"][name] for name in ("users", "items", "events", "lists")
        }

    return median(work, command, "dpo4rec_ray", data, rows, options.repeats)


def run_pandas(raw: Path, data: str, rows: int, options: argparse.Namespace) -> Measured:
    target = Path(options.folder).resolve() / "pandas"
    command = [
        "benchmarks/prepare_pandas.py",
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
        work_s, stats = work(output)
        runs.append(Measured(program, data, rows, round(wall_s, 1), round(work_s, 1), round(peak_mib), stats))
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
            if one.data == other.data and one.stats != other.stats:
                print(
                    f"{one.data}: {one.program} and {other.program} disagree: {one.figures}, {other.figures}",
                    file=sys.stderr,
                )
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
