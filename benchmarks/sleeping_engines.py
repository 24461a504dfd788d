"""Engines that sleep in place of an LLM, behind the stage `generate` as it is: pools, queue, parts and progress are real.

An engine writes so many samples at the same time; each takes a time of its own. It costs no CPU, so many fit on one machine.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import numpy as np
import psutil
from harness import ROOT, Row

from dpo4rec_ray.config import Config, load_config
from dpo4rec_ray.knowledge.completions import Answer, Completion
from dpo4rec_ray.stages import generate
from dpo4rec_ray.store import progress
from dpo4rec_ray.store.artifacts import RunDir, write_json
from dpo4rec_ray.texts.sources import SOURCES
from dpo4rec_ray.texts.text_source import TextWriter, WriterPlacement

SPREAD = 0.4  # standard deviation of the logarithm of a sample's seconds
WORDS = "likes quiet books about the sea " * 12  # about as long as a real text


@dataclass(frozen=True)
class Kind:
    """One engine: seconds of a sample in the mean, and how long after the first engine it is ready."""

    seconds: float
    late_s: float = 0.0


@dataclass(frozen=True)
class World:
    """All engines: their kinds, samples at the same time, and the folder through which they know of each other."""

    kinds: tuple[Kind, ...]
    slots: int
    folder: Path

    def samples_per_s(self, kind: Kind) -> float:
        return self.slots / kind.seconds

    def ideal_s(self, samples: int) -> float:
        """Seconds from the first engine's start if no engine ever waited, and work could be cut at will."""
        rates = [self.samples_per_s(kind) for kind in self.kinds]
        ahead = sum(rate * kind.late_s for rate, kind in zip(rates, self.kinds, strict=True))
        return (samples + ahead) / sum(rates)


class SleepingEngine(TextWriter):
    """Takes the first kind that is free, and is ready when all engines that are not late have a process."""

    def __init__(self, config: Config, store: RunDir, *, world: World):
        self._world = world
        self._number = self._claim()
        self._kind = world.kinds[self._number]
        self._built, self._asked = time.time(), False
        (world.folder / f"process-{self._number}").touch()
        while len(list(world.folder.glob("process-*"))) < len(world.kinds):
            time.sleep(0.02)
        time.sleep(self._kind.late_s)
        (world.folder / f"ready-{self._number}").touch()
        self._free = [0.0] * world.slots  # when each slot is free
        self._ends: list[float] = []  # of samples that nobody has counted yet
        self._finished = 0

    @classmethod
    def identity(cls, config: Config, store: RunDir) -> str:
        return "sleeping"

    def users(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Answer]:
        now, last = time.time(), 0.0
        if not self._asked:
            self._asked = True
            times = {"process": psutil.Process().create_time(), "built": self._built, "asked": now}
            write_json(self._world.folder / f"start-{self._number}.json", times)
        for seed, count in zip(seeds, counts, strict=True):
            times = np.random.default_rng(seed).lognormal(-(SPREAD**2) / 2, SPREAD, count)
            for seconds in times * self._kind.seconds:
                end = max(now, self._free[0]) + float(seconds)
                heapq.heapreplace(self._free, end)
                heapq.heappush(self._ends, end)
                last = max(last, end)
        time.sleep(max(0.0, last - time.time()))
        with open(self._world.folder / f"served-{self._number}", "a") as lines:
            lines.write(f"{sum(counts)} {last}\n")
        return [Answer([Completion([1], f"{take} {WORDS}", "stop") for take in range(n)]) for n in counts]

    def finished(self) -> int:
        while self._ends and self._ends[0] <= time.time():
            heapq.heappop(self._ends)
            self._finished += 1
        return self._finished

    def _claim(self) -> int:
        for number in range(len(self._world.kinds)):
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._world.folder / f"kind-{number}", os.O_CREAT | os.O_EXCL))
                return number
        raise RuntimeError("more engines than kinds")


def stage(folder: Path, kinds: Sequence[Kind], slots: int, users: int, samples: int, shard: int) -> Row:
    """`generate` over so many users, with so many samples each. Seconds count from the first engine's start."""
    shutil.rmtree(folder, ignore_errors=True)
    world = World(tuple(kinds), slots, folder / "engines")
    world.folder.mkdir(parents=True)

    class Sleeping(TextWriter):
        """The source, in the driver."""

        @classmethod
        def placement(cls, config: Config, store: RunDir, policy_round: int) -> WriterPlacement:
            return WriterPlacement(SleepingEngine, {"world": world}, num_cpus=1, batch=slots)

    harness.run("benchmarks/generate_peers.py", "users", str(folder / "run"), "--users", str(users))
    overrides = {"num_engines": len(kinds), "num_samples": samples, "users_per_shard": shard}
    config = load_config(
        ROOT / "jobs/recipes/demo.toml",
        ["llm.source=template", *(f"generate.{name}={value}" for name, value in overrides.items())],
    )
    SOURCES["template"] = Sleeping
    lines: list[tuple[float, str]] = []
    with said(lines):
        began = time.time()
        outcome = generate.run(config, RunDir(folder / "run"), 1)
        ended = time.time()
    assert outcome.rows_out == users * samples, "samples were lost or doubled"
    ready = [(world.folder / f"ready-{number}").stat().st_mtime for number in range(len(kinds))]
    served = {number: _served(world.folder / f"served-{number}") for number in range(len(kinds))}
    ideal = world.ideal_s(users * samples)
    starts = [json.loads(file.read_text()) for file in world.folder.glob("start-*.json")]
    first_rate = next((at for at, line in lines if "/s" in line), ended)
    return {
        "engines": len(kinds),
        "shards": -(-users // shard),
        "ideal_s": round(ideal, 1),
        "seconds": round(ended - ready[0], 1),
        "over_ideal": round((ended - ready[0]) / ideal, 3),
        "efficiency": round(ideal / (ended - ready[0]), 3),
        # From the stage's call until the last engine has a process, is being built, and is asked for its first sample.
        **{
            f"{name}_s": round(max(one[name] for one in starts) - began, 2)
            for name in ("process", "built", "asked")
        },
        "shards_of": [len(rows) for rows in served.values()],
        "idle_s_at_end": [
            round(ended - max([0.0, *(end for _, end in rows)]), 1) for rows in served.values()
        ],
        # A sample is shorter than the mean; the line may come before it, where it tells how long it has been waited for.
        "rate_line_s": round(first_rate - ready[0], 1),
    }


def _served(file: Path) -> list[tuple[int, float]]:
    if not file.exists():
        return []
    return [
        (int(count), float(end)) for count, end in (line.split() for line in file.read_text().splitlines())
    ]


@contextlib.contextmanager
def said(lines: list[tuple[float, str]]) -> Iterator[None]:
    """Collect what is said, with its time."""
    real = progress.say

    def say(text: str) -> None:
        lines.append((time.time(), text))
        print(text, file=sys.stderr, flush=True)

    progress.say = say
    try:
        yield
    finally:
        progress.say = real


@contextlib.contextmanager
def ray_for(engines: int) -> Iterator[None]:
    """A Ray of this process with a CPU for each engine, which only sleeps."""
    import ray
    import ray.data

    ray.init(
        address="local",
        num_cpus=engines + 1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=2**28,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ray.shutdown()
