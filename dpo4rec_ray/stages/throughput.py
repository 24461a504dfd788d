"""What a stage that writes texts has done and how fast, while it runs and for its manifest."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

Row = dict[str, Any]

# Counts of a shard; kept in the notes of its part, so that a run that goes on knows those of its beginning.
COUNTS = ("users", "samples", "tokens", "prompt_tokens", "clipped", "shortened", "invalid_json", "failed")


class Throughput:
    """Adds up shards. `add` takes what a worker answers: COUNTS and, from an engine, its own figures."""

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        self._engines: dict[str, Row] = {}
        self._first = 0.0
        self._base: Counter[str] = Counter()

    def add(self, answer: Row) -> None:
        self.total.update({name: int(answer.get(name) or 0) for name in COUNTS})
        if answer.get("engine"):
            self._engines[answer["engine"]] = answer
        if not self._first:  # rates count from the first result: before it workers were starting
            self._first, self._base = time.monotonic(), self.total.copy()

    @property
    def line(self) -> str:
        """For the progress line: rates, and how well each engine is used."""
        if not self._engines:
            seconds = time.monotonic() - self._first
            samples = self.total["samples"] - self._base["samples"]
            return f"{samples / seconds:,.0f} samples/s" if samples and seconds > 1 else ""
        # By the engines' own clocks: shards end in bunches, so that counting them overrates a short run.
        engines = [row for _, row in sorted(self._engines.items())]
        rates = [
            f"{sum(row[f'engine_{name}'] / max(row['span_s'], 1e-9) for row in engines):,.0f} {name}/s"
            for name in ("samples", "tokens")
        ]
        busy, kv_cache = (" ".join(f"{row[name]:.0%}" for row in engines) for name in ("busy", "kv_cache"))
        return ", ".join([*rates, f"engines busy {busy}", f"KV cache {kv_cache}"])

    @property
    def figures(self) -> Row:
        """For the manifest: the engines of this run, their rates by their own clocks."""
        engines = {
            name: {key: round(float(row[key]), 4) for key in ENGINE_FIGURES}
            | {"tokens_per_s": round(row["engine_tokens"] / max(row["span_s"], 1e-9), 1)}
            for name, row in sorted(self._engines.items())
        }
        if not engines:
            return {}
        return {
            "engines": engines,
            "tokens_per_s": round(sum(row["tokens_per_s"] for row in engines.values()), 1),
        }


ENGINE_FIGURES = ("busy", "running", "kv_cache", "prefix_hits", "start_s", "span_s", "engine_tokens")
