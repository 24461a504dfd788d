"""The benchmark of GRPO: prompts per second, memory and first steps, against TRL's GRPOTrainer (grpo_training.py)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dpo
import harness
from harness import Row

from dpo4rec_ray.serving.haproxy import free_ports

NUM_TEXTS, PROMPT, TEXT = 8, 300, 64
COMMON = {
    "batch_size": 1,
    "gradient_accumulation_steps": 4,
    "lr": 5e-5,
    "zero_stage": 0,
    "kl_weight": 0.04,
    "clip_low": 0.2,
    "longest": TEXT,
    "length_sorted": False,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument(
        "--repeats", type=int, default=3, help="of peer and trainer in turn; medians are shown"
    )
    parser.add_argument(
        "--steps", type=int, default=6, help="optimiser steps of 4 prompts that are timed, plus one"
    )


def run(options: argparse.Namespace, folder: Path) -> int:
    folder /= "grpo"
    harness.run_parts(folder, PARTS, options.parts, Bench(folder, options.repeats, options.steps + 1))
    return 0


@dataclass
class Bench:
    folder: Path
    repeats: int
    steps: int

    def data(self, prompt: list[int], text: list[int]) -> str:
        folder = dpo.Bench(self.folder, 1, self.steps).data(
            prompt, text, rows=4 * max(16, self.steps), num_rejected=NUM_TEXTS - 1
        )
        if not (Path(folder) / "token_logps.parquet").exists():
            harness.note(train("reference", {"folder": folder}))
        return folder


def train(what: str, spec: Row) -> Row:
    env = {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
    (port,) = free_ports(1)
    command = ["benchmarks/grpo_training.py", what, json.dumps({**spec, "port": port})]
    return harness.together([command], env)[0]


def measured(what: str, spec: Row) -> Row:
    """`train` without its losses."""
    row = train(what, spec)
    return {key: row[key] for key in ("pairs_per_s", "peak_mb", "before_mb")}


def peer(bench: Bench) -> list[Row]:
    """Prompts with their texts per second (pairs_per_s), and peak memory, in turn."""
    spec = {**COMMON, "folder": bench.data([PROMPT, PROMPT], [TEXT, TEXT]), "steps": bench.steps}
    programs: dict[str, Callable[[], Row]] = {
        "TRL GRPOTrainer": lambda: measured("trl", spec),
        "ours": lambda: measured("ours", {**spec, **dpo.ALL_ON, "length_sorted": False}),
        "ours, plain": lambda: measured("ours", {**spec, **dpo.PLAIN}),
    }
    found = dpo.over_trl(harness.in_turn(programs, bench.repeats, "pairs_per_s"))
    harness.print_table(found)
    return found


def parity(bench: Bench) -> list[Row]:
    """The first losses and gradient norms beside TRL's, same groups, order and LoRA."""
    spec = {**COMMON, "folder": bench.data([40, 80], [10, 30]), "steps": 12, "lr": 1e-3, "longest": 30}
    trl = train("trl", spec)
    found = []
    for name, on in (("plain", dpo.PLAIN), ("all on", {**dpo.ALL_ON, "length_sorted": False})):
        ours = train("ours", {**spec, **on})
        found.append(
            {
                "path": name,
                "first loss": ours["losses"][0],
                "last loss": ours["losses"][-1],
                "largest difference of losses": max(
                    abs(one - other) for one, other in zip(ours["losses"], trl["losses"], strict=True)
                ),
                "of gradient norms": dpo.worst(ours["grad_norms"], trl["grad_norms"]),
            }
        )
        harness.note(found[-1])
    harness.print_table(found)
    return found


PARTS: dict[str, Callable[[Bench], list[Row]]] = {"peer": peer, "parity": parity}
