"""How long engines and trainer wait for each other in turns: python benchmarks/bench.py waiting RUN, a run with several turns.

Measured: seconds of every turn of RUN by what worked, from the manifests. Reckoned: the same work on engines and trainers of
their own GPUs, 1:1 to 8:1, or on GPUs that both share. Twice the GPUs take half of the time for the same work; starts and
scoring take the seconds that they took.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import harness
from harness import Row

from dpo4rec_ray.config import read_config
from dpo4rec_ray.store.artifacts import Manifest, RunDir

RATIOS = (1, 2, 4, 8)


class Turn(NamedTuple):
    """Seconds of a turn in which engines wrote, the trainer read or trained, texts were scored, and workers started."""

    sampling: float
    training: float
    scoring: float
    starts: float


class Waits(NamedTuple):
    """Seconds of a turn, and the shares of them in which engines and trainers have nothing to do."""

    seconds: float
    engines: float
    trainers: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN")


def run(options: argparse.Namespace, folder: Path) -> int:
    store = RunDir(options.run_folder)
    config = read_config(store.root)
    workers = config.generate.num_engines, config.policy.num_workers
    found: list[Row] = []
    for number in range(1, config.run.num_turns + 1):
        if store.manifest("policy", number) is None:
            break
        turn = measured(store, number)
        total = sum(turn)
        row = {"turn": number, **{name: round(value, 1) for name, value in turn._asdict().items()}}
        row |= {"engines wait": 1 - turn.sampling / total, "trainer waits": 1 - turn.training / total}
        found.append(harness.note(row))
    harness.print_table(
        found,
        "turn {turn} | sampling s {sampling} | training s {training} | scoring s {scoring} | starts s {starts} | "
        "engines wait {engines wait:.0%} | trainer waits {trainer waits:.0%}",
    )
    turns = [Turn(*(row[name] for name in Turn._fields)) for row in found[1:] or found]
    mean = Turn(*(sum(values) / len(turns) for values in zip(*turns, strict=True)))
    reckoned = []
    for ratio in RATIOS:
        for way, waits in ways(mean, workers, ratio).items():
            reckoned.append({"ratio": f"{ratio} to 1", "way": way, **waits._asdict()})
    harness.print_table(
        reckoned,
        "engines to trainers {ratio} | way {way} | turn s {seconds:.1f} | engines wait {engines:.0%} | "
        "trainers wait {trainers:.0%}",
    )
    harness.write_results(folder / f"waiting-{store.root.name}.json", [*found, *reckoned])
    return 0


def measured(store: RunDir, number: int) -> Turn:
    """Of one turn. The first result of a worker ends its start."""
    made = {name: store.require(name, number) for name in ("generations", "scores", "policy")}
    sampling, scoring, training = (worked(one) for one in made.values())
    pairs = store.manifest("pairs", number)
    starts = sum(one.seconds for one in made.values()) - sampling - scoring - training
    return Turn(sampling, training, scoring + (pairs.seconds if pairs else 0.0), starts)


def worked(made: Manifest) -> float:
    """Seconds between the first and the last result of each of a stage's parts, and what the first results took at that rate."""
    total = 0.0
    for one in made.timings:
        rest, units = one["last_s"] - one["first_s"], one["units"] - one["first_units"]
        total += rest * one["units"] / units if units else one["last_s"]
    return min(total, made.seconds)


def ways(turn: Turn, workers: tuple[int, int], ratio: int) -> dict[str, Waits]:
    """The turn's work on `ratio` GPUs of engines and one of a trainer, in turn, at the same time, or on shared GPUs.

    workers: engines and trainers that the seconds of `turn` were measured with.
    """
    sampling, training = turn.sampling * workers[0] / ratio, turn.training * workers[1]
    other = turn.scoring + turn.starts
    in_turn = sampling + training + other
    # The next turn's texts are written while this one's are learned from: they are one turn old.
    longest = max(sampling, training) + other
    shared = (turn.sampling * workers[0] + turn.training * workers[1]) / (ratio + 1)
    return {
        "own GPUs, in turn": Waits(in_turn, 1 - sampling / in_turn, 1 - training / in_turn),
        "own GPUs, one turn behind": Waits(longest, 1 - sampling / longest, 1 - training / longest),
        "shared GPUs, in turn": Waits(shared + other, other / (shared + other), other / (shared + other)),
    }
