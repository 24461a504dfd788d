"""The benchmark of the stage `dpo`: pairs per second and first steps, against TRL's DPOTrainer (dpo_training.py)."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import harness
from harness import Row

from dpo4rec_ray.serving.haproxy import free_ports

SHAPES = {"600/150": (600, 150), "300/150": (300, 150)}
ALL_ON = {"prefix_sharing": True, "packing": True, "length_sorted": True, "chunk_tokens": 512}
PLAIN = {"prefix_sharing": False, "packing": False, "length_sorted": False, "chunk_tokens": 0}
COMMON = {
    "batch_size": 2,
    "gradient_accumulation_steps": 4,
    "beta": 0.1,
    "loss": "sigmoid",
    "lr": 5e-5,
    "zero_stage": 0,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    own = ",".join(name for name in PARTS if name != "llm")
    parser.add_argument("--parts", default=own, help="and llm; each writes its own results")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of peer and trainer in turn; medians are shown"
    )
    parser.add_argument(
        "--steps", type=int, default=8, help="optimiser steps of 8 pairs that are timed, plus one"
    )
    parser.add_argument("--llm", default="", help="folder of a real LLM for the part `llm`")
    parser.add_argument("--gpu", action="store_true", help="instead: an 8B-shaped Llama on one GPU")


def run(options: argparse.Namespace, folder: Path) -> int:
    folder /= "dpo"
    bench = Bench(folder, options.repeats, options.steps + 1, "8b" if options.gpu else "11m", options.llm)
    if options.gpu:
        harness.run_parts(folder, {"gpu": gpu}, "gpu", bench)
    else:
        harness.run_parts(folder, PARTS, options.parts, bench)
    return 0


@dataclass
class Bench:
    """Where things are, and how often."""

    folder: Path
    repeats: int
    steps: int
    shape: str = "11m"
    llm: str = ""

    def data(self, prompt: list[int], completion: list[int], rows: int, num_rejected: int = 1) -> str:
        """Folder of a model and pairs, made once."""
        name = f"{self.shape}-{prompt[0]}-{prompt[1]}-{completion[0]}-{completion[1]}-{rows}-{num_rejected}"
        folder = self.folder / name
        if not (folder / "pairs.parquet").exists():
            shape = {"prompt": prompt, "completion": completion, "rows": rows, "num_rejected": num_rejected}
            train("make", {"folder": str(folder), "shape": self.shape, **shape})
        if not (folder / "reference.parquet").exists():
            harness.note(train("reference", {"folder": str(folder), "shape": self.shape}))
        return str(folder)


def train(what: str, spec: Row, threads: int = 2) -> Row:
    """One training in a process of its own (`world` of them); rank 0's answer, with the memory of all."""
    world = spec.get("world", 1)
    env = {
        "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL's trainer would report each run
        "OMP_NUM_THREADS": str(max(1, threads // world)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    (port,) = free_ports(1)
    answers = harness.together(
        [
            ["benchmarks/dpo_training.py", what, json.dumps({**spec, "rank": rank, "port": port})]
            for rank in range(world)
        ],
        env,
    )
    return {**answers[0], **({"peak_mb": sum(one["peak_mb"] for one in answers)} if world > 1 else {})}


def peer(bench: Bench) -> list[Row]:
    """Pairs per second and peak memory beside TRL's DPOTrainer and our own plain path, in turn."""
    found: list[Row] = []
    for name, (prompt, completion) in SHAPES.items():
        folder = bench.data([prompt, prompt], [completion, completion], rows=max(64, 8 * bench.steps))
        spec = {**COMMON, "folder": folder, "steps": bench.steps}
        programs: dict[str, Callable[[], Row]] = {
            "TRL DPOTrainer": lambda spec=spec: measured("trl", spec),
            "ours": lambda spec=spec: measured("ours", {**spec, **ALL_ON}),
            "ours, plain": lambda spec=spec: measured("ours", {**spec, **PLAIN}),
        }
        rows = harness.in_turn(programs, bench.repeats, "pairs_per_s")
        found += [{"prompt/text": name, **row} for row in over_trl(rows)]
    harness.print_table(found)
    return found


def over_trl(rows: list[Row]) -> list[Row]:
    """Each row with its rate and memory over those of the first, which is TRL's."""
    rate, memory = (rows[0][key] for key in ("pairs_per_s", "peak_mb"))
    return [
        {
            **row,
            "over TRL": round(row["pairs_per_s"] / rate, 2),
            "memory over TRL": round(row["peak_mb"] / memory, 2),
        }
        for row in rows
    ]


def measured(what: str, spec: Row) -> Row:
    """`train` without its losses."""
    row = train(what, spec)
    return {key: row[key] for key in ("pairs_per_s", "peak_mb", "before_mb")}


def switches(bench: Bench) -> list[Row]:
    """What each switch gains on pairs of varying lengths: added to the plain path, and taken away from all of them."""
    folder = bench.data([300, 900], [60, 240], rows=max(64, 8 * bench.steps))
    spec = {**COMMON, "folder": folder, "steps": bench.steps}
    cases = {"plain": PLAIN}
    cases |= {f"plain + {name}": {**PLAIN, name: value} for name, value in ALL_ON.items()}
    cases |= {"all": ALL_ON}
    cases |= {f"all - {name}": {**ALL_ON, name: PLAIN[name]} for name in ALL_ON}
    found: list[Row] = []
    for name, on in cases.items():
        row = train("ours", {**spec, **on})
        found.append({"switches": name, **{key: row[key] for key in ("pairs_per_s", "peak_mb")}})
        harness.note(found[-1])
    for row in found:
        row["over plain"] = round(row["pairs_per_s"] / found[0]["pairs_per_s"], 2)
    harness.print_table(found)
    return found


def parity(bench: Bench) -> list[Row]:
    """The first 20 losses and gradient norms beside TRL's, same pairs, order and LoRA."""
    folder = bench.data([40, 80], [10, 30], rows=160)
    found: list[Row] = []
    for loss, theirs, more in (
        ("sigmoid", "sigmoid", {}),
        ("hinge", "hinge", {}),
        ("ipo_norm", "ipo", {}),
        ("robust", "robust", {"label_smoothing": 0.1}),
        ("sigmoid_norm", "sigmoid_norm", {}),
    ):
        spec = {**COMMON, "folder": folder, "steps": 20, "lr": 1e-3, **more}
        trl = train("trl", {**spec, "loss": theirs})
        for name, on in (("plain", PLAIN), ("all on", {**ALL_ON, "length_sorted": False})):
            ours = train("ours", {**spec, "loss": loss, **on})
            found.append(
                {
                    "loss": loss,
                    "TRL's name": theirs,
                    "path": name,
                    "first loss": ours["losses"][0],
                    "last loss": ours["losses"][-1],
                    "largest difference of losses": worst(ours["losses"], trl["losses"]),
                    "of gradient norms": worst(ours["grad_norms"], trl["grad_norms"]),
                }
            )
            harness.note(found[-1])
    harness.print_table(found)
    return found


def real_llm(bench: Bench) -> list[Row]:
    """Beside TRL's DPOTrainer with a real LLM in bfloat16: its vocabulary, not its layers, may take most of time and memory."""
    if not bench.llm:
        raise SystemExit("the part `llm` needs --llm FOLDER")
    shape = {"prompt": [250, 250], "completion": [40, 40], "rows": 8 * bench.steps}
    spec = {
        **COMMON,
        "folder": str(bench.folder / Path(bench.llm).name),
        "llm": bench.llm,
        "steps": bench.steps,
    }
    train("make", {**spec, **shape})
    train("reference", spec)
    programs: dict[str, Callable[[], Row]] = {
        "TRL DPOTrainer": lambda: measured("trl", spec),
        "ours": lambda: measured("ours", {**spec, **ALL_ON}),
        "ours, chunks of 128": lambda: measured("ours", {**spec, **ALL_ON, "chunk_tokens": 128}),
    }
    found = over_trl(harness.in_turn(programs, bench.repeats, "pairs_per_s"))
    harness.print_table(found)
    return found


def workers(bench: Bench) -> list[Row]:
    """The same global batch in different pieces, and ZeRO 0 to 3 on 1 and 2 workers: steps and final weights."""
    from safetensors.torch import load_file

    folder = bench.data([40, 80], [10, 30], rows=160)
    found: list[Row] = []
    first: Row = {}
    with tempfile.TemporaryDirectory() as place:
        for world, batch_size, stage in (
            (1, 8, 0),
            (1, 1, 0),
            (2, 4, 0),
            (2, 1, 0),
            *((world, 8 // world, stage) for world in (1, 2) for stage in (1, 2, 3)),
        ):
            weights = f"{place}/{len(found)}.safetensors"
            spec = {
                **COMMON,
                **ALL_ON,
                "folder": folder,
                "steps": 20,
                "lr": 1e-3,
                "world": world,
                "batch_size": batch_size,
                "gradient_accumulation_steps": 8 // world // batch_size,
                "zero_stage": stage,
                "weights": weights,
            }
            row = train("ours", spec)
            own = load_file(weights)
            first = first or {"run": row, "weights": own}
            largest = max((own[name] - value).abs().max().item() for name, value in first["weights"].items())
            found.append(
                {
                    "workers": world,
                    "batch x accumulation steps": f"{batch_size} x {spec['gradient_accumulation_steps']}",
                    "ZeRO": stage,
                    "largest difference of losses": worst(row["losses"], first["run"]["losses"]),
                    "of gradient norms": worst(row["grad_norms"], first["run"]["grad_norms"]),
                    "of final weights": f"{largest:.1e}",
                }
            )
            harness.note(found[-1])
    harness.print_table(found)
    return found


def gpu(bench: Bench) -> list[Row]:
    """An 8B-shaped Llama in bfloat16 on one GPU: LoRA and full (ZeRO-3, optimizer offloaded), with and without sharing.

    Model FLOPs: 2 per weight and token forwards and again backwards to the activations, 2 more where weights are trained; of
    989 TFLOP/s, an H200's dense bfloat16 peak. Tokens are those computed, so that sharing raises pairs/s and not these.
    """
    folder = bench.data([600, 600], [256, 256], rows=8 * bench.steps)
    weights = 8.03e9
    found: list[Row] = []
    for tuning, more, flops in (
        ("lora", {}, 4),
        ("full", {"zero_stage": 3, "offload_optimizer": True, "activation_checkpointing": True}, 8),
    ):
        for name, on in (
            ("all on", ALL_ON),
            ("no sharing", {**ALL_ON, "prefix_sharing": False}),
            ("plain", PLAIN),
        ):
            spec = {
                **COMMON,
                **on,
                **more,
                "folder": folder,
                "shape": "8b",
                "steps": bench.steps,
                "tuning": tuning,
            }
            row = train("ours", spec, threads=os.cpu_count() or 1)
            used = row["tokens_per_s"] * flops * weights / 989e12
            shown = {key: row[key] for key in ("pairs_per_s", "tokens_per_s", "peak_mb")}
            found.append({"tuning": tuning, "switches": name, **shown, "of the peak": f"{used:.0%}"})
            harness.note(found[-1])
    harness.print_table(found)
    return found


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "peer": peer,
    "switches": switches,
    "parity": parity,
    "workers": workers,
    "llm": real_llm,
}


def worst(ours: list[float], theirs: list[float]) -> str:
    """Largest relative difference, of as many steps as both have."""
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    return f"{max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, theirs, strict=True)):.1e}"
