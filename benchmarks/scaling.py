"""The benchmark of scale: 1 to 32 engines that sleep, and the memory of the driver by users.

Each number of users is measured in a process of its own, python benchmarks/scaling.py FOLDER --users 10000, which prints one
JSON line. Part `users` is the stage `generate` with sentences that are made at once, because only the driver is looked at; part
`shards` is what all stages share, the queue, Ray Data and the progress, with shards of 64 users of which nothing is made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import ROOT, Peaks, Row
from sleeping_engines import Kind, ray_for, stage

from dpo4rec_ray.config import load_config
from dpo4rec_ray.stages import generate
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.workers.shards import Pool, run_shards, shard_ranges

SLOTS, SAMPLES, SHARD = 64, 10, 16  # samples at once, of a user, and users of a shard
MAX_SHARDS = 16_000  # of the driver's run: with more users, shards are larger


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", default="engines,scorers,users,shards")
    parser.add_argument("--engines", default="1,2,4,8,16,32")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a sample in the mean")
    parser.add_argument("--waves", type=int, default=20, help="samples that each of an engine's slots writes")
    parser.add_argument("--users", default="10000,100000,1000000,10000000", help="of the driver's memory")


def run(options: argparse.Namespace, folder: Path) -> int:
    """The parts that are asked for."""
    parts = {"engines": engines, "scorers": scorers, "users": users, "shards": shards}
    harness.run_parts(folder / "scaling", parts, options.parts, (options, folder / "scaling"))
    return 0


def engines(bench: Any) -> list[Row]:
    """The same work for each engine, whatever their number."""
    options, folder = bench
    found: list[Row] = []
    for number in map(int, options.engines.split(",")):
        num_users = number * options.waves * SLOTS // SAMPLES
        with ray_for(number):
            kinds = [Kind(options.seconds)] * number
            found.append(harness.note(stage(folder / "engines", kinds, SLOTS, num_users, SAMPLES, SHARD)))
    harness.print_table(
        found,
        "engines {engines} | shards {shards} | s {seconds} | ideal s {ideal_s} | efficiency {efficiency:.2f} | "
        "s from the call to the last engine's first sample asked for {asked_s}",
    )
    return found


def scorers(bench: Any) -> list[Row]:
    """The two pools of `score`: one encoder for four scorers, which it keeps at work; vectors are as large as real ones."""
    options, _ = bench
    found: list[Row] = []
    for number in map(int, options.engines.split(",")):
        with ray_for(2 * number):
            encoders = Pool(Encoder, {"seconds": options.seconds / 4}, -(-number // 4), 1)
            pools = [encoders, Pool(Scorer, {"seconds": options.seconds}, number, 1)]
            shards = shard_ranges(number * options.waves * SHARD, SHARD)
            progress = Progress("scorers", len(shards) * SHARD, "users")
            rows = list(run_shards(shards, pools, progress))
        assert len(rows) == len(shards)
        # From the first scorer's first shard on: starting 32 processes on two cores says nothing about a cluster.
        seconds = max(row["ended"] for row in rows) - min(row["began"] for row in rows)
        ideal = sum(row["slept"] for row in rows) / number
        row = {
            "scorers": number,
            "shards": len(shards),
            "ideal_s": round(ideal, 1),
            "seconds": round(seconds, 1),
        }
        found.append(harness.note(row | {"efficiency": round(ideal / seconds, 3)}))
    harness.print_table(
        found,
        "scorers {scorers} | shards {shards} | s {seconds} | ideal s {ideal_s} | efficiency {efficiency:.2f}",
    )
    return found


def users(bench: Any) -> list[Row]:
    """The driver alone: neither its workers nor what it maps of the object store."""
    options, folder = bench
    found: list[Row] = []
    for number in map(int, options.users.split(",")):
        shutil.rmtree(folder / "users", ignore_errors=True)
        command = ["benchmarks/generate_peers.py", "users", str(folder / "users"), "--events", "1"]
        harness.run(*command, "--users", str(number))
        answer = harness.run("benchmarks/scaling.py", str(folder / "users"), "--users", str(number))
        found.append(harness.note(answer))
    shutil.rmtree(folder / "users", ignore_errors=True)
    return shown(found)


def shards(bench: Any) -> list[Row]:
    """Shards alone pass through the driver."""
    options, folder = bench
    command = ["benchmarks/scaling.py", str(folder), "--nothing", "--users"]
    return shown([harness.note(harness.run(*command, number)) for number in options.users.split(",")])


def shown(found: list[Row]) -> list[Row]:
    harness.print_table(
        found,
        "users {users:,} | shards {shards:,} | driver before, MiB {before_mib:,.0f} | "
        "peak, MiB {peak_mib:,.0f} | s {seconds:,.0f}",
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/scaling.py", description="The driver's memory.")
    parser.add_argument("folder")
    parser.add_argument("--users", type=int, required=True)
    parser.add_argument("--nothing", action="store_true")
    options = parser.parse_args()
    per_shard = 64 if options.nothing else max(64, -(-options.users // MAX_SHARDS))
    with ray_for(2):
        before, peaks = _driver_mib(), [0.0]
        threading.Thread(target=_watch, args=(peaks,), daemon=True).start()
        began = time.monotonic()
        (_nothing if options.nothing else _generate)(options.folder, options.users, per_shard)
        seconds = time.monotonic() - began
    answer = {
        "users": options.users,
        "shards": -(-options.users // per_shard),
        "before_mib": before,
        "peak_mib": peaks[0],
        "seconds": round(seconds, 1),
    }
    print(json.dumps(answer))
    return 0


def _generate(folder: str, num_users: int, per_shard: int) -> None:
    overrides = {"num_engines": 2, "num_samples": 2, "users_per_shard": per_shard}
    config = load_config(
        ROOT / "jobs/recipes/demo.toml",
        ["llm.source=template", *(f"generate.{name}={value}" for name, value in overrides.items())],
    )
    store = RunDir(folder)
    shutil.rmtree(store.path("generations", 1), ignore_errors=True)
    assert generate.run(config, store, 1).rows_out == 2 * num_users


def _nothing(folder: str, num_users: int, per_shard: int) -> None:
    pool = Pool(Nothing, {}, size=2, num_cpus=1)
    progress = Progress("shards", num_users, "users")
    done = sum(row["users"] for row in run_shards(shard_ranges(num_users, per_shard), [pool], progress))
    assert done == num_users


class Encoder:
    """Sleeps as long as the vectors of a shard take, and hands over as many."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def __call__(self, row: Row) -> Row:
        time.sleep(self._seconds)
        users = row["high"] - row["low"]
        return {
            "shard": row["shard"],
            "users": users,
            "vectors": np.zeros((users * SAMPLES, 384), np.float32),
        }


class Scorer:
    """Sleeps as long as the rewards of a shard take, shorter or longer."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def __call__(self, row: Row) -> Row:
        began = time.time()
        slept = self._seconds * np.random.default_rng(int(row["shard"])).uniform(0.5, 1.5)
        time.sleep(slept)
        return {
            "shard": row["shard"],
            "users": row["users"],
            "slept": slept,
            "began": began,
            "ended": time.time(),
        }


class Nothing:
    """A worker that makes nothing of a shard."""

    def __call__(self, row: Row) -> Row:
        return {"shard": row["shard"], "users": row["high"] - row["low"]}


def _driver_mib() -> float:
    peaks = Peaks()
    peaks.look(os.getpid())
    return peaks.driver_mib


def _watch(peaks: list[float]) -> None:
    while True:
        peaks[0] = max(peaks[0], _driver_mib())
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
