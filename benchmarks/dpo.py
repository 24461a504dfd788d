"""The parts of `python benchmarks/bench.py dpo`: each is a table and a file of results. The trainings: dpo_training.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dpo_training as program

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"600/150": (600, 150), "300/150": (300, 150)}
ALL_ON = {"prefix_sharing": True, "packing": True, "length_sorted": True, "chunk_tokens": 512}
PLAIN = {"prefix_sharing": False, "packing": False, "length_sorted": False, "chunk_tokens": 0}
COMMON = {"batch_size": 2, "gradient_accumulation_steps": 4, "beta": 0.1, "loss": "sigmoid", "lr": 5e-5}
Found = list[dict[str, Any]]


@dataclass
class Bench:
    """Where things are, and how often."""

    folder: Path
    repeats: int
    steps: int
    shape: str = "11m"

    def data(self, prompt: list[int], completion: list[int], rows: int, num_rejected: int = 1) -> str:
        """Folder of a model and pairs, made once."""
        name = f"{self.shape}-{prompt[0]}-{prompt[1]}-{completion[0]}-{completion[1]}-{rows}-{num_rejected}"
        folder = self.folder / name
        if not (folder / "pairs.parquet").exists():
            shape = {"prompt": prompt, "completion": completion, "rows": rows, "num_rejected": num_rejected}
            run("make", {"folder": str(folder), "shape": self.shape, **shape})
        if not (folder / "reference.parquet").exists():
            made = run("reference", {"folder": str(folder), "shape": self.shape})
            print(f"reference: {made}", file=sys.stderr, flush=True)
        return str(folder)


def run(what: str, spec: dict[str, Any], threads: int = 2) -> dict[str, Any]:
    """One training in a process of its own (`world` of them); rank 0's answer."""
    world = spec.get("world", 1)
    port = program.free_port() if world > 1 else None
    env = {
        **os.environ,
        "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL's trainer would report each run
        "OMP_NUM_THREADS": str(max(1, threads // world)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    processes = []
    for rank in range(world):
        own = {**spec, "rank": rank, **({"port": port} if port else {})}
        command = [sys.executable, str(ROOT / "benchmarks/dpo_training.py"), what, json.dumps(own)]
        processes.append(
            subprocess.Popen(
                command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    outputs = [process.communicate() for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("\n".join(error[-2000:] for _, error in outputs))
    answers = [json.loads(output.strip().splitlines()[-1]) for output, _ in outputs]
    return {**answers[0], **({"peak_mb": sum(one["peak_mb"] for one in answers)} if world > 1 else {})}


def peer(bench: Bench) -> Found:
    """Pairs per second and peak memory beside TRL's DPOTrainer and our own plain path, in turn."""
    found: Found = []
    for name, (prompt, completion) in SHAPES.items():
        folder = bench.data([prompt, prompt], [completion, completion], rows=max(64, 8 * bench.steps))
        spec = {**COMMON, "folder": folder, "steps": bench.steps}
        programs: dict[str, Callable[[], dict[str, Any]]] = {
            "TRL DPOTrainer": lambda spec=spec: run("trl", spec),
            "ours": lambda spec=spec: run("ours", {**spec, **ALL_ON}),
            "ours, plain": lambda spec=spec: run("ours", {**spec, **PLAIN}),
        }
        runs: dict[str, Found] = {one: [] for one in programs}
        for _ in range(bench.repeats):
            for one, start in programs.items():
                runs[one].append(start())
                shown = {key: runs[one][-1][key] for key in ("pairs_per_s", "peak_mb", "before_mb")}
                print(f"{name} {one}: {shown}", file=sys.stderr, flush=True)
        middle = {
            one: sorted(all_runs, key=lambda run: run["pairs_per_s"])[len(all_runs) // 2]
            for one, all_runs in runs.items()
        }
        base = middle["TRL DPOTrainer"]
        for one, row in middle.items():
            found.append(
                {
                    "prompt/text": name,
                    "program": one,
                    **{key: row[key] for key in ("pairs_per_s", "peak_mb", "before_mb")},
                    "rates": [each["pairs_per_s"] for each in runs[one]],
                    "over TRL": round(row["pairs_per_s"] / base["pairs_per_s"], 2),
                    "memory over TRL": round(row["peak_mb"] / base["peak_mb"], 2),
                }
            )
    print_table(found)
    return found


def switches(bench: Bench) -> Found:
    """What each switch brings, on pairs of varying lengths: alone over the plain path, and its loss when it is taken away."""
    folder = bench.data([300, 900], [60, 240], rows=max(64, 8 * bench.steps))
    spec = {**COMMON, "folder": folder, "steps": bench.steps}
    cases = {"plain": PLAIN}
    cases |= {f"plain + {name}": {**PLAIN, name: value} for name, value in ALL_ON.items()}
    cases |= {"all": ALL_ON}
    cases |= {f"all - {name}": {**ALL_ON, name: PLAIN[name]} for name in ALL_ON}
    found: Found = []
    for name, on in cases.items():
        row = run("ours", {**spec, **on})
        found.append({"switches": name, **{key: row[key] for key in ("pairs_per_s", "peak_mb")}})
        print(found[-1], file=sys.stderr, flush=True)
    for row in found:
        row["over plain"] = round(row["pairs_per_s"] / found[0]["pairs_per_s"], 2)
    print_table(found)
    return found


def parity(bench: Bench) -> Found:
    """The first 20 losses and gradient norms beside TRL's, same pairs, order and LoRA."""
    folder = bench.data([40, 80], [10, 30], rows=160)
    found: Found = []
    for loss, theirs, more in (
        ("sigmoid", "sigmoid", {}),
        ("hinge", "hinge", {}),
        ("ipo_norm", "ipo", {}),
        ("robust", "robust", {"label_smoothing": 0.1}),
        ("sigmoid_norm", "sigmoid_norm", {}),
    ):
        spec = {**COMMON, "folder": folder, "steps": 20, "lr": 1e-3, **more}
        trl = run("trl", {**spec, "loss": theirs})
        for name, on in (("plain", PLAIN), ("all on", {**ALL_ON, "length_sorted": False})):
            ours = run("ours", {**spec, "loss": loss, **on})
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
            print(found[-1], file=sys.stderr, flush=True)
    print_table(found)
    return found


def workers(bench: Bench) -> Found:
    """The same global batch in different pieces, and ZeRO 0 to 3 on 1 and 2 workers: steps and final weights."""
    from safetensors.torch import load_file

    folder = bench.data([40, 80], [10, 30], rows=160)
    found: Found = []
    first: dict[str, Any] = {}
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
            row = run("ours", spec)
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
            print(found[-1], file=sys.stderr, flush=True)
    print_table(found)
    return found


def gpu(bench: Bench) -> Found:
    """An 8B-shaped Llama in bfloat16 on one GPU: LoRA and full (ZeRO-3, optimizer offloaded), with and without sharing.

    Model FLOPs: 2 per weight and token forwards and again backwards to the activations, 2 more where weights are trained; of
    989 TFLOP/s, an H200's dense bfloat16 peak. Tokens are those computed, so that sharing raises pairs/s and not these.
    """
    folder = bench.data([600, 600], [256, 256], rows=8 * bench.steps)
    weights = 8.03e9
    found: Found = []
    for tuning, more, flops in (
        ("lora", {"zero_stage": 0}, 4),
        ("full", {"zero_stage": 3, "offload": True, "checkpointing": True}, 8),
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
            row = run("ours", spec, threads=os.cpu_count() or 1)
            used = row["tokens_per_s"] * flops * weights / 989e12
            shown = {key: row[key] for key in ("pairs_per_s", "tokens_per_s", "peak_mb")}
            found.append({"tuning": tuning, "switches": name, **shown, "of the peak": f"{used:.0%}"})
            print(found[-1], file=sys.stderr, flush=True)
    print_table(found)
    return found


PARTS: dict[str, Callable[[Bench], Found]] = {
    "peer": peer,
    "switches": switches,
    "parity": parity,
    "workers": workers,
}


def worst(ours: list[float], theirs: list[float]) -> str:
    """Largest relative difference, of as many steps as both have."""
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    return f"{max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, theirs, strict=True)):.1e}"


def print_table(found: Found) -> None:
    """Markdown."""
    names = list(found[0])
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in found:
        print("| " + " | ".join(str(row[name]) for name in names) + " |")
    print(flush=True)
