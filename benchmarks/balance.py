"""The benchmark of how shards are handed out: two engines, one half as fast and started late, against the ideal.

The engines sleep (sleeping_engines.py). The ideal is a fluid: every engine writes from its start to the end at its full rate,
and all end at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
from sleeping_engines import Kind, ray_for, stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--users", type=int, default=640)
    parser.add_argument("--samples", type=int, default=10, help="of a user")
    parser.add_argument("--users-per-shard", type=int, default=16)
    parser.add_argument(
        "--slots", type=int, default=64, help="samples that an engine writes at the same time"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of a sample in the mean")
    parser.add_argument("--late", type=float, default=60.0, help="seconds after the first engine")


def run(options: argparse.Namespace, folder: Path) -> int:
    """The fast engine first, then the slow one; and the other way round."""
    fast, slow = options.seconds, 2 * options.seconds
    cases = {
        "the slow engine is late": (Kind(fast), Kind(slow, options.late)),
        "the fast engine is late": (Kind(slow), Kind(fast, options.late)),
    }
    found = []
    with ray_for(2):
        for name, kinds in cases.items():
            row = stage(
                folder / "balance",
                kinds,
                options.slots,
                options.users,
                options.samples,
                options.users_per_shard,
            )
            found.append(harness.note({"case": name, **row}))
    harness.print_table(
        found,
        "case {case} | shards {shards} | of each engine {shards_of} | s {seconds} | ideal s {ideal_s} | over the ideal "
        "{over_ideal:.2f} | idle at the end, s {idle_s_at_end} | first rate shown after s {rate_line_s}",
    )
    harness.write_results(folder / "balance.json", found)
    return 0
