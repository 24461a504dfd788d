"""What a stage that writes texts has done and how fast, while it runs and for its manifest."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dpo4rec_ray.store import events
from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.workers.shards import Pool, Row, run_shards

# Counts of a shard. They stay in the notes of its part, so that a resumed run knows those of the shards it keeps.
COUNTS = ("users", "samples", "tokens", "prompt_tokens", "clipped", "shortened", "invalid_json", "failed",
          "requests", "retries")  # fmt: skip
ENGINE_STATS = ("busy", "running", "kv_cache", "prefix_hits", "start_s", "span_s", "engine_tokens")
# An engine without an answer for so many seconds is not shown: it may have been replaced.
_RECENT_S = 60.0


class Throughput:
    """Adds up shards. `add` takes a worker's answer: COUNTS and, from an engine, its own stats."""

    def __init__(self, num_engines: int) -> None:
        self._num_engines = num_engines
        self.total: Counter[str] = Counter()
        self._engines: dict[str, Row] = {}
        self._first = 0.0
        self._base: Counter[str] = Counter()

    def add(self, answer: Row) -> str:
        """Count a shard; returns `line`."""
        self.total.update({name: int(answer.get(name) or 0) for name in COUNTS})
        if answer.get("failed"):
            events.note("set_aside", shard=answer.get("shard"), users=answer["failed"])
        if answer.get("engine"):
            self._note_start(answer["engine"])
            known = self._engines.get(answer["engine"])
            # Answers can arrive in another order than the shards ended: the newest is kept.
            newer = not known or answer["engine_tokens"] >= known["engine_tokens"]
            self._engines[answer["engine"]] = {**(answer if newer else known), "seen": time.monotonic()}
        if not self._first:  # rates count from the first result, because the workers started before it
            self._first, self._base = time.monotonic(), self.total.copy()
        return self.line

    def _note_start(self, engine: str) -> None:
        """An event for an engine that was not heard of before; where all are known, it replaces one that died."""
        if engine not in self._engines:
            event = "worker_started" if len(self._engines) < self._num_engines else "worker_restarted"
            events.note(event, worker=engine, node=engine.rpartition("-")[0])

    @property
    def line(self) -> str:
        """For the progress line: rates, and how well each engine is used."""
        if not self._engines:
            seconds = time.monotonic() - self._first
            done = {name: self.total[name] - self._base[name] for name in ("samples", "tokens")}
            rates = [f"{number / seconds:,.0f} {name}/s" for name, number in done.items() if number]
            return ", ".join(rates) if seconds > 1 else ""
        # By the engines' own clocks. Many shards end at the same time: counting them makes a short run look too fast.
        engines = list(self._engines.values())
        span = sum(row["span_s"] for row in engines) / self._at_once
        rates = [
            f"{sum(row[f'engine_{name}'] for row in engines) / max(span, 1e-9):,.0f} {name}/s"
            for name in ("samples", "tokens")
        ]
        now = [row for row in engines if time.monotonic() - row["seen"] < _RECENT_S]
        levels = [
            f"{label} {min(row[name] for row in now):.0%} to {max(row[name] for row in now):.0%}"
            if len(now) > 1
            else f"{label} {now[0][name]:.0%}"
            for name, label in (("busy", "engines busy"), ("kv_cache", "KV cache"))
            if now
        ]
        return ", ".join([*rates, *levels])

    @property
    def stats(self) -> Row:
        """For the manifest: the engines of this run and their rates, by their own clocks."""
        engines = {
            name: {key: round(float(row[key]), 4) for key in ENGINE_STATS}
            for name, row in sorted(self._engines.items())
        }
        if not engines:
            return {}
        tokens, span = (sum(row[name] for row in engines.values()) for name in ("engine_tokens", "span_s"))
        return {"engines": engines, "tokens_per_s": round(tokens * self._at_once / max(span, 1e-9), 1)}

    @property
    def _at_once(self) -> int:
        """Engines at work at the same time. Replaced engines are not counted twice, and idle ones not at all."""
        return min(self._num_engines, len(self._engines))


def stream_texts(
    label: str,
    unit: str,
    todo: Sequence[tuple[int, int, int]],
    pools: Sequence[Pool],
    total: int,
    already: int,
) -> dict[str, Any]:
    """Run shards (shard, low, high) through the pools; the stats of their engines.

    total, already: users or items of the whole stage, and those that an earlier run has done.
    """
    throughput = Throughput(pools[0].size)
    progress = Progress(label, total, unit, already=already)
    for _ in run_shards(todo, pools, progress, already=already, extra=throughput.add):
        pass
    return throughput.stats
