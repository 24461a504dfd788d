"""The benchmark of serving: requests per second, against a no-op deployment and bare FastAPI (serve_peers.py).

Load comes from wrk, a process of its own (Debian and Ubuntu: apt install wrk). Every list is a random user's and random items.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import harness
import psutil
import requests
from harness import ROOT, Row

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving.api import RerankResponse
from dpo4rec_ray.serving.client import Client
from dpo4rec_ray.serving.haproxy import free_ports
from dpo4rec_ray.serving.loaded_version import RankTask
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.version_check import load_version
from dpo4rec_ray.store.memory import tree_mb

WORLD = [
    "llm.source=statistics",
    "run.num_rounds=0",
    "sample.num_users=2000",
    "sample.num_items=600",
    "reranker.epochs=2",
    'evaluate.backbones=["prm"]',
    "evaluate.num_seeds=2",
]
CLIENTS = (1, 8, 32, 128)
CANDIDATES = (10, 100)
# Different requests in a load.
BODIES = 2000
RATES = (
    "candidates {candidates} | clients {clients} | server {server} | requests/s {requests_per_s:,.0f} | p50 ms {p50_ms:.2f} | "
    "p99 ms {p99_ms:.1f} | failed {failed} | of the no-op: requests/s, p50 {rate_ratio:.2f}, {wait_ratio:.2f}"
)
SOAK = (
    "minute {minute} | requests/s {requests_per_s:,.0f} | p99 ms {p99_ms:.1f} | failed {failed} | "
    "replica MiB {replica_mib:.0f} | process tree MiB {tree_mib:.0f}"
)
FAULTS = (
    "{what} | client {client} | answers {answers} | by v1, v2 {v1}, {v2} | failed {failed} | wrong {wrong}"
)
SCRIPT = """
local bodies, place, counts = {}, 0, {}
for line in io.lines(os.getenv("BODIES")) do bodies[#bodies + 1] = line end
function init(args) math.randomseed(os.time()); place = math.random(#bodies) end
function request()
  place = place % #bodies + 1
  return wrk.format("POST", "/v1/rerank", {["Content-Type"] = "application/json"}, bodies[place])
end
function done(summary, latency, rates)
  io.write(string.format(
    '{"requests": %d, "microseconds": %d, "p50": %f, "p99": %f, "status": %d, "socket": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), summary.errors.status,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout))
end
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", default=",".join(PARTS), help="each writes its own results")
    parser.add_argument("--repeats", type=int, default=3, help="of all servers in turn; medians are shown")
    parser.add_argument("--seconds", type=float, default=10, help="of every measurement")
    parser.add_argument("--minutes", type=float, default=10, help="of the part `soak`")


def run(options: argparse.Namespace, folder: Path) -> int:
    folder /= "serve"
    bench = Bench(folder, options.seconds, options.repeats, options.minutes)
    harness.run_parts(folder, PARTS, options.parts, bench)
    return 0


@dataclass
class Bench:
    """Where things are, how long and how often."""

    folder: Path
    seconds: float
    repeats: int
    minutes: float

    def registry(self) -> Registry:
        """A registry with two versions of one run, made once: v1 answers."""
        registry = Registry(self.folder / "registry")
        if not registry.routing().current:
            world = self.folder / "runs/world"
            recipe = ["jobs/recipes/demo.toml", f"run.root={world.parent}", f"run.name={world.name}"]
            harness.run("jobs/run.py", *recipe, *WORLD)
            for seed, name in enumerate(("v1", "v2")):
                version = ["--as", name, "--model", f"prm-statistics-seed{seed}"]
                harness.run(
                    "jobs/serve.py", "publish", str(world), *version, "--registry", str(registry.root)
                )
            registry.promote("v1")
        return registry

    def bodies(self, registry: Registry, candidates: int) -> Path:
        """Requests, one per line."""
        version = load_version(registry.folder("v1")).files
        draw = random.Random(candidates)
        items = version.items["raw_id"].to_pylist()
        file = self.folder / f"bodies-{candidates}.jsonl"
        with open(file, "w", encoding="utf-8") as lines:
            for _ in range(BODIES):
                user = version.user_id(draw.randrange(version.card.num_users))
                body = {"user_id": user, "candidates": draw.sample(items, candidates)}
                lines.write(json.dumps(body) + "\n")
        return file


@contextlib.contextmanager
def served(what: str, registry: Registry, *changes: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server ("dpo4rec_ray" or a peer of benchmarks/serve_peers.py) in a process of its own: its address and the process."""
    (port,) = free_ports(1)
    if what == "dpo4rec_ray":
        command = ["jobs/serve.py", "run", "--registry", str(registry.root), f"serving.port={port}", *changes]
    else:
        command = ["benchmarks/serve_peers.py", what, str(port), str(registry.root)]
    log = registry.root.parent / f"{what}.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=output, stderr=output, env=harness.environment()
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.post(f"{url}/v1/rerank", json={}, timeout=5).status_code in (200, 422):
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{what} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield url, process
    finally:
        process.terminate()
        process.wait(60)


def load(url: str, bodies: Path, clients: int, seconds: float) -> Row:
    """What wrk measures: requests/s, p50_ms, p99_ms and failed requests."""
    wrk = shutil.which("wrk")
    if wrk is None:
        raise UserError("wrk is not installed; on Debian and Ubuntu: apt install wrk")
    script = bodies.with_suffix(".lua")
    script.write_text(SCRIPT)
    command = [wrk, "-t1", f"-c{clients}", f"-d{seconds:g}s", "--timeout", "10s", "-s", str(script), url]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "BODIES": str(bodies)}
    )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        "clients": clients,
        "requests_per_s": found["requests"] / found["microseconds"] * 1e6,
        "p50_ms": found["p50"] / 1e3,
        "p99_ms": found["p99"] / 1e3,
        "failed": found["status"] + found["socket"],
        "requests": found["requests"],
    }


def rates(bench: Bench) -> list[Row]:
    """Requests per second and latency beside the peers, in turn."""
    registry = bench.registry()
    runs: list[Row] = []
    for _ in range(bench.repeats):
        for what in ("noop", "noop-tuned", "dpo4rec_ray", "fastapi"):
            with served(what, registry) as (url, _process):
                for candidates in CANDIDATES:
                    bodies = bench.bodies(registry, candidates)
                    load(url, bodies, 8, 2)  # warm
                    for clients in CLIENTS:
                        one = {"server": what, "candidates": candidates}
                        runs.append(harness.note(one | load(url, bodies, clients, bench.seconds)))
    harness.print_table(rates_rows(runs), RATES)
    return runs


def rates_rows(runs: list[Row]) -> list[Row]:
    """Medians over the repeats, and ratios to the no-op of the same clients and candidates."""
    found: dict[tuple[int, int, str], Row] = {}
    for one in sorted(runs, key=lambda run: (run["candidates"], run["clients"])):
        key = (one["candidates"], one["clients"], one["server"])
        same = [run for run in runs if (run["candidates"], run["clients"], run["server"]) == key]
        names = ("requests_per_s", "p50_ms", "p99_ms")
        found[key] = {**one, **{name: statistics.median(run[name] for run in same) for name in names}}
        found[key]["failed"] = sum(run["failed"] for run in same)
    for (candidates, clients, _), row in found.items():
        floor = found[candidates, clients, "noop"]
        row["rate_ratio"], row["wait_ratio"] = (
            row[name] / floor[name] for name in ("requests_per_s", "p50_ms")
        )
    return list(found.values())


def soak(bench: Bench) -> list[Row]:
    """Saturation for minutes: failures, and the memory of the whole process tree meanwhile."""
    registry = bench.registry()
    bodies = bench.bodies(registry, 10)
    runs: list[Row] = []
    with served("dpo4rec_ray", registry) as (url, process):
        for minute in range(int(bench.minutes)):
            one = {"minute": minute + 1, **load(url, bodies, 128, 60), "tree_mib": tree_mb(process.pid)}
            one["replica_mib"] = replica(process.pid).memory_info().rss / 2**20
            runs.append(harness.note(one))
    harness.print_table(runs, SOAK)
    return runs


def faults(bench: Bench) -> list[Row]:
    """A version swap, a killed replica and a killed controller under load: what fails, and whether an answer is wrong."""
    registry = bench.registry()
    bodies = [json.loads(line) for line in bench.bodies(registry, 10).read_text().splitlines()]
    expected = {}
    for name in ("v1", "v2"):
        asked = [RankTask(body["candidates"], body["user_id"]) for body in bodies]
        rankings = load_version(registry.folder(name)).rank(asked)
        expected[name] = [
            dict(zip(one.candidates, ranking.scores.tolist(), strict=True))
            for one, ranking in zip(asked, rankings, strict=True)
        ]
    runs: list[Row] = []
    two = ("serving.num_replicas=2", "serving.cpus_per_replica=0.5")
    with served("dpo4rec_ray", registry, *two) as (url, process):
        for what, harm in (
            ("nothing", lambda: None),
            ("version swap", lambda: registry.promote("v2")),
            ("rollback", registry.rollback),
            ("replica killed", lambda: replica(process.pid).kill()),
            ("controller killed", lambda: child(process.pid, "ServeController").kill()),
        ):
            for retry in (False, True):
                counts = under_load(url, bodies, expected, harm, bench.seconds * 3, retry)
                one = {"what": what, "client": "one retry" if retry else "no retry", **counts}
                runs.append(harness.note(one))
                if what in ("version swap", "rollback"):
                    registry.promote("v1" if what == "version swap" else "v2")
                wait_for_replicas(process.pid, 2)
    harness.print_table(runs, FAULTS)
    return runs


def under_load(
    url: str,
    bodies: list[Row],
    expected: dict[str, list[dict[str, float]]],
    harm: Callable[[], object],
    seconds: float,
    retry: bool,
    threads: int = 4,
) -> Row:
    """Ask from several threads, do the harm after a third of the time, and check every answer."""
    counts: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    end = time.monotonic() + seconds

    def ask(number: int) -> None:
        client, session = Client(url), requests.Session()
        place = number
        while time.monotonic() < end:
            place = (place + threads) % len(bodies)
            try:
                if retry:
                    answer = client.rerank(**bodies[place])
                else:
                    response = session.post(f"{url}/v1/rerank", json=bodies[place], timeout=10)
                    response.raise_for_status()
                    answer = RerankResponse.model_validate_json(response.content)
            except Exception as error:
                counts["failed"] += 1
                failures[f"{type(error).__name__}: {str(error)[:80]}"] += 1
                continue
            counts["answers"] += 1
            counts[answer.model] += 1
            right = expected[answer.model][place]
            given = {one.item_id: one.relevance_score for one in answer.results}
            counts["wrong"] += given.keys() != right.keys() or any(
                given[item] is None or abs(given[item] - right[item]) > 1e-4 for item in right
            )

    asking = [threading.Thread(target=ask, args=(number,)) for number in range(threads)]
    for thread in asking:
        thread.start()
    time.sleep(seconds / 3)
    harm()
    for thread in asking:
        thread.join()
    return {
        **{name: counts[name] for name in ("answers", "v1", "v2", "failed", "wrong")},
        "failures": failures,
    }


def child(pid: int, name: str) -> psutil.Process:
    """The first process below `pid` whose command line has `name` in it."""
    return next(found for found in children(pid, name))


def replica(pid: int) -> psutil.Process:
    return child(pid, "ServeReplica:rerank")


def children(pid: int, name: str) -> Iterator[psutil.Process]:
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name in " ".join(process.cmdline()):
                yield process


def wait_for_replicas(pid: int, count: int) -> None:
    """Until a killed one has been replaced and is found by HAProxy."""
    deadline = time.monotonic() + 120
    while len(list(children(pid, "ServeReplica:rerank"))) < count and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(10)


PARTS = {"rates": rates, "soak": soak, "faults": faults}
