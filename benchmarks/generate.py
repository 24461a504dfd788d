"""The benchmark of the stage `generate`: samples per second, against vLLM and transformers alone (generate_peers.py)."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
from harness import Peaks, Row

from dpo4rec_ray.config.texts import GenerateSection, LLMSection
from dpo4rec_ray.knowledge.engine_spec import EngineSpec, ServedWeights
from dpo4rec_ray.store.artifacts import RunDir

# Engine arguments that the stage sets and vLLM has other defaults for; enforce_eager is measured under `settings`.
OURS = "block_size,enable_chunked_prefill,max_num_batched_tokens,max_num_seqs"
# Of every synthetic user: prompts of about 600 tokens. Histories of the sample world are shorter.
GPU_EVENTS = 30
GPU_ENGINE = [
    "generate.gpus_per_engine=1",
    'generate.engine_args.load_format="dummy"',
    "llm.dtype=bfloat16",
    "llm.max_model_len=1024",
    "prompt.factors=movies",
]
RATES = (
    "LLM {llm} | program {program} | samples {samples:,} | tokens {tokens:,} | seconds {seconds} | "
    "tokens/s, median {tokens_per_s:,.0f} | all runs {rates} | same samples as the stage {same_samples:.1%} | "
    "stage / this {stage_over_this:.2f}"
)
MEMORY = "driver MiB {driver_mib:,.0f} | object store MiB {store_mib:,.2f} | whole tree MiB {tree_mib:,.0f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", default=",".join(PARTS), help="each writes its own results")
    parser.add_argument("--gpu", action="store_true", help="an 8B-shaped LLM on one GPU; only `steady`")
    parser.add_argument("--repeats", type=int, default=3, help="of stage and peer in turn; medians are shown")
    parser.add_argument(
        "--size", type=float, default=1.0, help="of all inputs; 0.05 shows that everything runs"
    )
    parser.add_argument(
        "--simulated", default="100000,1000000", help="users that `simulated` writes template texts for"
    )


def run(options: argparse.Namespace, folder: Path) -> int:
    folder = folder / ("generate-gpu" if options.gpu else "generate")
    simulated = [int(number) for number in options.simulated.split(",")]
    bench = Bench(folder, options.repeats, options.size, options.gpu, simulated)
    harness.run_parts(folder, PARTS, "steady" if options.gpu else options.parts, bench)
    return 0


@dataclass
class Bench:
    """What the parts share: where things are, and how the stage and its peers are run."""

    folder: Path
    repeats: int
    size: float
    gpu: bool
    simulated: list[int]

    def model(self, shape: str, stop: str = "never") -> Path:
        """Folder of a random LLM, made once."""
        folder = self.folder / f"llm-{shape}-{stop}"
        if not (folder / "generation_config.json").exists():
            peer("model", str(folder), "--shape", shape, "--stop", stop)
        return folder

    def recipe(self, model: Path, users: int, max_new_tokens: int, *more: str) -> list[str]:
        """Recipe and overrides of a run with about so many users; they are prepared once per number."""
        count = max(40, round(users * self.size))
        name = f"users-{count}"
        common = [
            "jobs/recipes/demo.toml",
            f"run.root={self.folder}",
            f"run.name={name}",
            f"sample.num_users={round(count / 0.9)}",  # a tenth is for testing and gets no samples
        ]
        store = RunDir(self.folder / name)
        if self.gpu and store.manifest("users") is None:
            peer("users", str(store.root), "--users", str(count), "--events", str(GPU_EVENTS))
        elif not self.gpu and store.manifest("lists") is None:
            harness.run("jobs/run.py", *common, "--only", "prepare")
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

    def transformers(self, recipe: list[str], users: int) -> Row:
        return peer("transformers", *recipe, "--users", str(max(8, round(users * self.size))))


def peer(program: str, *arguments: str) -> Row:
    return harness.run("benchmarks/generate_peers.py", program, *arguments)


def stage(recipe: list[str]) -> tuple[Row, Peaks]:
    """Run the stage. Its rate is by the engines' own clocks, from first request to last answer."""
    _, peaks, _ = harness.watched(["jobs/run.py", *recipe, "--only", "generate"])
    stats = harness.manifest_of(recipe, "generations", 1).stats
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


def steady(bench: Bench) -> list[Row]:
    """Equal lengths: the stage, the same requests in one call of LLM.generate, and transformers."""
    found: list[Row] = []
    cases = [("8b", 2000, 256)] if bench.gpu else [("4m", 600, 64), ("bundled", 1600, 48)]
    for shape, users, max_new_tokens in cases:
        recipe = bench.recipe(bench.model(shape), users, max_new_tokens)
        programs: dict[str, Callable[[], Row]] = {
            "stage": lambda recipe=recipe: stage(recipe)[0],
            "LLM.generate": lambda recipe=recipe: peer("vllm", *recipe, "--compare"),
        }
        rows = harness.in_turn(programs, bench.repeats, "tokens_per_s")
        if not bench.gpu:
            rows.append({"program": "vLLM's defaults", **peer("vllm", *recipe, "--drop", OURS, "--no-seeds")})
            rows.append({"program": "transformers", **bench.transformers(recipe, 32)})
        found += with_ratio({"llm": shape, **row} for row in rows)
    harness.print_table(found, RATES)
    return found


def varying(bench: Bench) -> list[Row]:
    """Lengths from 1 to 256: the stage, LLM.generate called shard by shard, and one call with everything."""
    recipe = bench.recipe(bench.model("4m", "often"), 1000, 256, "llm.max_model_len=512")
    programs: dict[str, Callable[[], Row]] = {
        "stage": lambda: stage(recipe)[0],
        "LLM.generate, shard by shard": lambda: peer("vllm", *recipe, "--calls", "shard", "--compare"),
        "LLM.generate, one call": lambda: peer("vllm", *recipe, "--compare"),
    }
    rows = harness.in_turn(programs, bench.repeats, "tokens_per_s")
    found = with_ratio({"llm": "4m, many EOS", **row} for row in rows)
    harness.print_table(found, RATES)
    return found


def with_ratio(rows: Iterable[Row]) -> list[Row]:
    """The rate of the stage, which is the first row, over that of each program."""
    rows = list(rows)
    return [{**row, "stage_over_this": rows[0]["tokens_per_s"] / row["tokens_per_s"]} for row in rows]


def settings(bench: Bench) -> list[Row]:
    """What each setting of the CPU engine is worth: LLM.generate in as many processes as there are engines."""
    # With seeds, chunked prefill ends the CPU engine: its random generators cannot start at an offset.
    no_seeds = ["--no-seeds"]
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
    found: list[Row] = []
    for name, engines, threads, arguments, more in cases:
        flags = [*more, "--threads", str(threads), "--engine-args", json.dumps(arguments)]
        row = {"setting": name, **side_by_side(recipe, engines, flags)}
        row["over_first"] = row["tokens_per_s"] / (found or [row])[0]["tokens_per_s"]
        found.append(harness.note(row))
    harness.print_table(
        found,
        "setting {setting} | tokens/s {tokens_per_s:,.0f} | over the first {over_first:.2f} | start s {start_s} | "
        "MiB {rss_mib:,}",
    )
    return found


def side_by_side(recipe: list[str], engines: int, flags: list[str]) -> Row:
    """LLM.generate in several processes that begin together, each with its share of the users."""
    command = ["benchmarks/generate_peers.py", "vllm", *recipe, *flags]
    with tempfile.TemporaryDirectory() as gate:
        rows = harness.together(
            [[*command, "--part", f"{index}/{engines}", "--gate", gate] for index in range(engines)]
        )
    seconds, tokens = max(row["seconds"] for row in rows), sum(row["tokens"] for row in rows)
    return {
        "engines": engines,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": round(tokens / seconds, 1),
        "start_s": max(row["start_s"] for row in rows),
        "rss_mib": sum(row["rss_mib"] for row in rows),
    }


def start(bench: Bench) -> list[Row]:
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

    def start_once(env: dict[str, str], arguments: dict[str, Any]) -> Row:
        shutil.rmtree(cache / "torch_compile_cache", ignore_errors=True)
        return harness.run("benchmarks/engine_start.py", json.dumps(env), json.dumps(arguments))

    start_once(unbound, ours)  # the files that it reads are in memory from now on
    found: list[Row] = []
    for name, env, arguments in cases:
        runs = [start_once(env, arguments) for _ in range(bench.repeats)]
        row = {"start": name, **harness.median_run(runs, "all")}
        row["cut by"] = round((found or [row])[-1]["all"] - row["all"], 1)
        found.append(harness.note(row))
    harness.print_table(found)
    return found


def scale(bench: Bench) -> list[Row]:
    """The stage on 1x and 10x as many users: time must grow with them, the driver and the object store must not."""
    found: list[Row] = []
    for times in (1, 10):
        stats, peaks = stage(bench.recipe(bench.model("4m"), 250 * times, 64))
        found.append({"users": f"{times}x", **stats, **asdict(peaks)})
    stage_columns = "users {users} | samples {samples:,} | seconds {seconds} | tokens/s {tokens_per_s:,.0f}"
    harness.print_table(found, f"{stage_columns} | {MEMORY}")
    one, ten = found
    memory = [row["driver_mib"] + row["store_mib"] for row in found]
    times = ten["seconds"] / one["seconds"]
    print(f"10x / 1x: time {times:.2f}, driver and store {memory[1] / memory[0]:.2f}")
    return found


def simulated(bench: Bench) -> list[Row]:
    """Simulated texts (llm.source = "template", no LLM) of many users through the stage, two workers."""
    found: list[Row] = []
    for users in bench.simulated:
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
            peer("users", str(store.root), "--users", str(users))
        wall_s, peaks, _ = harness.watched(["jobs/run.py", *recipe, "--only", "generate"])
        manifest = harness.manifest_of(recipe, "generations", 1)
        row = {"users": users, "rows": manifest.rows, "wall_s": round(wall_s, 1), "seconds": manifest.seconds}
        row |= {"users_per_s": users / manifest.seconds, **asdict(peaks)}
        row |= {
            f"{name}_mib": folder_mib(store.path(name, int(name != "users")))
            for name in ("users", "generations")
        }
        found.append(harness.note(row))
    texts = "simulated users {users:,} | texts {rows:,} | stage s {seconds:,} | users/s {users_per_s:,.0f}"
    disk = "users on disk MiB {users_mib:,.0f} | texts on disk MiB {generations_mib:,.0f}"
    harness.print_table(found, f"{texts} | {MEMORY} | {disk}")
    return found


def folder_mib(folder: Path) -> float:
    return round(sum(file.stat().st_size for file in folder.rglob("*.parquet")) / 2**20, 1)


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "steady": steady,
    "varying": varying,
    "settings": settings,
    "start": start,
    "scale": scale,
    "simulated": simulated,
}
