"""Where an engine's start goes: python benchmarks/engine_start.py ENV ARGUMENTS (JSON objects). Prints one JSON line.

Times are those of vLLM's own log lines. This file imports next to nothing: vLLM's further processes import it again.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil

# Phase -> how the log line that ends it begins. All but "import", "first token" and what comes last.
ENDS = {
    "config": "Loading HfRenderer",
    "processes and worker": "Starting to load model",
    "model": "Using LBHNC KV cache layout",
    "compile and warm-up": "Explicitly set",
}


def main() -> int:
    env, arguments = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        settings = {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"timed": {"format": "%(created).3f|%(message)s"}},
            "handlers": {
                "file": {"class": "logging.FileHandler", "formatter": "timed", "filename": str(log)}
            },
            "loggers": {"vllm": {"handlers": ["file"], "level": "DEBUG", "propagate": False}},
        }
        (Path(folder) / "logging.json").write_text(json.dumps(settings))
        os.environ.update({**env, "VLLM_LOGGING_CONFIG_PATH": str(Path(folder) / "logging.json")})
        began = psutil.Process().create_time()
        from vllm import LLM, SamplingParams

        imported = time.time()
        llm = LLM(**arguments)
        ready = time.time()
        llm.generate({"prompt_token_ids": [1, 5, 6, 7]}, SamplingParams(max_tokens=1), use_tqdm=False)
        answered = time.time()
        llm.llm_engine.engine_core.shutdown()  # else Python's exit may wait for vLLM's processes for ever
        print(json.dumps(phases(log.read_text(), began, imported, ready, answered)))
    return 0


def phases(log: str, began: float, imported: float, ready: float, answered: float) -> dict[str, float]:
    """Seconds per phase, in order; the log's times and the others are seconds since the epoch."""
    found: dict[str, float] = {"Python and import": imported - began}
    last = imported
    for phase, beginning in ENDS.items():
        times = [float(line.split("|", 1)[0]) for line in log.splitlines() if f"|{beginning}" in line]
        found[phase] = max(0.0, min(times) - last) if times else 0.0
        last += found[phase]
    found["KV cache and rest"] = ready - last
    found["first token"] = answered - ready
    found["all"] = answered - began
    return {phase: round(seconds, 2) for phase, seconds in found.items()}


if __name__ == "__main__":
    sys.exit(main())
