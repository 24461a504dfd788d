"""Actors that turn a shard of users (or items) into texts. Shared by generate and encode.

An actor works on several shards at once, so that its engine stays full while one shard's last samples are written and
another's prompts are read. What writes the texts comes from `sources.SOURCES`. When an engine dies its process ends,
Ray starts a new actor and hands it the same shards; `attempts` then finds out whether one prompt is to blame.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.knowledge.generator import Gate
from dpo4rec_ray.knowledge.prompts import item_text
from dpo4rec_ray.knowledge.structured import json_factors, read_samples
from dpo4rec_ray.store.artifacts import RunDir, part_file, part_notes, write_part
from dpo4rec_ray.store.reading import UserRows
from dpo4rec_ray.texts.attempts import Attempt, Start, note_of
from dpo4rec_ray.texts.sources import SOURCES, Row, Source, Texts
from dpo4rec_ray.workers.shards import Pool

MAX_SHARDS_AT_ONCE = 16
_GENERATION_COLUMNS = (
    "round",
    "user_id",
    "sample_id",
    "prompt_token_ids",
    "token_ids",
    "text",
    "finish_reason",
)


class Sampler:
    """One source of texts inside an actor, with retries and counts. What is written about is up to the heirs."""

    subject = "user"

    def __init__(
        self,
        store: RunDir,
        *,
        folder: str,
        source: Source,
        seed: int,
        job: str,
        num_engines: int = 1,
        json_factors: Sequence[str] | None = None,
    ):
        """folder: of the artifact that is written; job: changes with every start of the driver; json_factors: of texts
        that are JSON."""
        self._folder, self._seed, self._job = folder, seed, job
        self._factors = json_factors
        self._engine = f"{socket.gethostname()}-{os.getpid()}"
        self._dies, self._gate = source.dies, Gate()
        if source.dies:
            start = Start(folder, job, self._engine, num_engines)
            self._write = source.build(store, last_words=note_of(folder, self._engine))
            start.done()
        else:
            self._write = source.build(store)
        self._gauges = Gauges(self._engine)

    def texts(self, shard: int, ids: Sequence[int], ask: Callable[[slice], list[Texts]]) -> list[Texts]:
        """`ask` for the texts of all; after engines died at this shard alone, then one by one."""
        if not self._dies:
            return ask(slice(None))
        attempt = Attempt.begin(self._folder, shard, self._job, self._engine)
        if attempt.deaths < 2 and not attempt.alone:
            with self._gate.alone() if attempt.deaths else self._gate.shared():
                attempt.enter()
                found = ask(slice(None))
        else:
            found = []
            for index, subject_id in enumerate(ids):
                if attempt.poison(subject_id):
                    words = attempt.last_words or "its engine died twice"
                    found.append(Texts([], [], "engine_died", words))
                    continue
                with self._gate.alone():  # nobody else in the engine to blame, or to be blamed
                    attempt.enter(subject_id)
                    found += ask(slice(index, index + 1))
                    attempt.leave()
        attempt.end()
        return found

    def checked(self, texts: Sequence[Texts], counts: Sequence[int]) -> tuple[list[Texts], Row]:
        """Texts with a reason for everybody who lacks some, sentences in place of JSON, and the shard's counts."""
        totals: Counter[str] = Counter(users=len(texts))
        kept: list[Texts] = []
        for one, count in zip(texts, counts, strict=True):
            reason = one.reason or failure(one, count)
            samples, invalid = read_samples(one.samples, self._factors)
            if self._factors is not None:
                totals["invalid_json"] += invalid
            kept.append(Texts(one.prompt_token_ids, samples, reason, one.detail, one.num_left_out))
            totals["prompt_tokens"] += len(one.prompt_token_ids)
            totals["shortened"] += one.num_left_out > 0
            totals["failed"] += bool(reason)
            totals["samples"] += len(samples)
            totals["tokens"] += sum(len(sample.token_ids) for sample in samples)
            totals.update(one.usage)
            totals["clipped"] += sum(sample.finish_reason == "length" for sample in samples)
        self._gauges.count(totals)
        return kept, dict(totals)

    def engine_row(self) -> Row:
        """The engine's own figures for the driver; empty where there is no engine."""
        stats = self._write.stats()
        if stats is None:
            return {"engine": ""}
        self._gauges.engine(stats.busy, stats.running, stats.kv_cache)
        row = asdict(stats)
        # not under the names that a shard's own counts have
        done = {f"engine_{name}": row.pop(name) for name in ("tokens", "samples")}
        return {**row, **done, "engine": self._engine}

    def write_failed(self, round_id: int, shard: int, ids: Sequence[int], texts: Sequence[Texts]) -> None:
        """Name who has no texts; before the part itself, whose presence means that the whole shard is accounted for."""
        rows = [(i, one) for i, one in zip(ids, texts, strict=True) if one.reason]
        folder = Path(self._folder) / "failed"
        if not rows:
            part_file(folder, shard).unlink(
                missing_ok=True
            )  # of an earlier try that was killed before its part
            return
        folder.mkdir(exist_ok=True)
        table = {
            "round": [round_id] * len(rows),
            "subject": [self.subject] * len(rows),
            "subject_id": [subject_id for subject_id, _ in rows],
            "reason": [one.reason for _, one in rows],
            "detail": [one.detail for _, one in rows],
        }
        write_part(folder, "failed", pa.table(table), shard)


class UserSampler(Sampler):
    """Samples texts for the users of a shard."""

    def __init__(
        self,
        store: RunDir,
        *,
        num_samples: dict[str, int],
        takes_part: Callable[[np.ndarray], np.ndarray] | None = None,
        **arguments: Any,
    ):
        """num_samples: per split; users of other splits are left out. takes_part: ids [n] -> bool [n]; None: all do."""
        super().__init__(store, **arguments)
        self._num_samples, self._takes_part = num_samples, takes_part
        self._users = UserRows(store, tuple(num_samples))

    def sample(self, shard: int, low: int, high: int) -> tuple[list[int], list[Texts], list[int], Row]:
        """Ids, texts and wanted counts of the users in [low, high), and the shard's counts."""
        table = self._users.read(low, high)
        if self._takes_part is not None:
            table = table.filter(pa.array(self._takes_part(table["user_id"].to_numpy())))
        rows = table.to_pylist()
        counts = [self._num_samples[row["split"]] for row in rows]
        ids = [row["user_id"] for row in rows]
        seeds = [seed_of(self._seed, user_id) for user_id in ids]

        def ask(part: slice) -> list[Texts]:
            return self._write.users(rows[part], seeds[part], counts[part])

        texts, totals = self.checked(self.texts(shard, ids, ask), counts)
        return ids, texts, counts, totals


class ShardGenerator(UserSampler):
    """Commits a shard's samples as one part of `generations`; users without all N samples are named, not written."""

    def __init__(self, store: RunDir, round_id: int, **arguments: Any):
        super().__init__(store, **arguments)
        self._round = round_id

    def __call__(self, row: Row) -> Row:
        shard = int(row["shard"])
        if part_file(self._folder, shard).exists():  # by an actor that died before it could say so
            return {"shard": shard, **part_notes(part_file(self._folder, shard))[1], **self.engine_row()}
        ids, texts, counts, totals = self.sample(shard, int(row["low"]), int(row["high"]))
        columns: dict[str, list[Any]] = {name: [] for name in _GENERATION_COLUMNS}
        for user_id, one, count in zip(ids, texts, counts, strict=True):
            if one.reason:
                continue
            assert len(one.samples) == count
            columns["round"] += [self._round] * count
            columns["user_id"] += [user_id] * count
            columns["sample_id"] += range(count)
            columns["prompt_token_ids"] += [one.prompt_token_ids] * count
            columns["token_ids"] += [sample.token_ids for sample in one.samples]
            columns["text"] += [sample.text for sample in one.samples]
            columns["finish_reason"] += [sample.finish_reason for sample in one.samples]
        self.write_failed(self._round, shard, ids, texts)
        write_part(self._folder, "generations", pa.table(columns), shard, totals)
        return {"shard": shard, **totals, **self.engine_row()}


class TextSampler(UserSampler):
    """Hands a shard's texts on to the pool of encoders."""

    def __init__(self, store: RunDir, round_id: int, **arguments: Any):
        super().__init__(store, **arguments)
        self._round = round_id

    def __call__(self, row: Row) -> Row:
        shard = int(row["shard"])
        ids, texts, counts, totals = self.sample(shard, int(row["low"]), int(row["high"]))
        self.write_failed(self._round, shard, ids, texts)
        found: dict[str, list[Any]] = {"subject_ids": [], "sample_ids": [], "texts": []}
        for user_id, one, count in zip(ids, texts, counts, strict=True):
            # every user needs a vector: what is missing gets the empty text's, and the user is named
            own = [sample.text for sample in one.samples]
            found["texts"] += own + [""] * (count - len(own))
            found["subject_ids"] += [user_id] * count
            found["sample_ids"] += range(count)
        return {"shard": shard, **found, "totals": {**totals, **self.engine_row()}}


class ItemSampler(Sampler):
    """Describes a range of the catalogue; an item without a description is encoded by its own title and attributes."""

    subject = "item"

    def __init__(self, store: RunDir, round_id: int, first_part: int, **arguments: Any):
        """first_part: number of the part that shard 0 becomes; users' parts come before."""
        super().__init__(store, **arguments)
        self._round, self._first_part = round_id, first_part
        self._items = store.read("items")

    def __call__(self, row: Row) -> Row:
        part, low, high = self._first_part + int(row["shard"]), int(row["low"]), int(row["high"])
        rows = self._items.slice(low, high - low).to_pylist()
        ids = [item["item_id"] for item in rows]
        seeds = [seed_of(self._seed, "item", item_id) for item_id in ids]

        def ask(part: slice) -> list[Texts]:
            return self._write.items(rows[part], seeds[part])

        texts, totals = self.checked(self.texts(part, ids, ask), [1] * len(ids))
        self.write_failed(self._round, part, ids, texts)
        return {
            "shard": row["shard"],
            "subject_ids": ids,
            "sample_ids": [0] * len(ids),
            "texts": [
                item_text(item["title"], item["attributes"]) if one.reason else one.samples[0].text
                for item, one in zip(rows, texts, strict=True)
            ],
            "totals": {**totals, **self.engine_row()},
        }


def failure(texts: Texts, count: int) -> str:
    """Why a user's samples cannot be used; empty when they can."""
    if len(texts.samples) != count:
        return "missing_samples"
    return "empty_text" if any(not sample.text.strip() for sample in texts.samples) else ""


class Gauges:
    """The same figures for Ray's dashboard and its Prometheus endpoint."""

    def __init__(self, engine: str):
        from ray.util.metrics import Counter as RayCounter
        from ray.util.metrics import Gauge

        names = ("users", "samples", "tokens", "failed")
        self._counters = {
            name: RayCounter(f"dpo4rec_{name}", f"{name} done by this engine", ("engine",)) for name in names
        }
        self._levels = {
            name: Gauge(
                f"dpo4rec_engine_{name}", f"{name} of this engine, mean since its first request", ("engine",)
            )
            for name in ("busy", "running", "kv_cache")
        }
        self._tags = {"engine": engine}
        self._lock = threading.Lock()

    def count(self, totals: Counter[str]) -> None:
        with self._lock:
            for name, counter in self._counters.items():
                if totals[name]:
                    counter.inc(totals[name], self._tags)

    def engine(self, busy: float, running: float, kv_cache: float) -> None:
        with self._lock:
            for name, value in (("busy", busy), ("running", running), ("kv_cache", kv_cache)):
                self._levels[name].set(value, self._tags)


def engine_pool(
    config: Config,
    store: RunDir,
    worker: type,
    policy_round: int,
    stage: str,
    *,
    folder: str,
    samples_per_shard: int,
    **more: Any,
) -> Pool:
    """The pool that writes policy `policy_round`'s texts. samples_per_shard: how much one shard gives an engine to do."""
    source = SOURCES[config.llm.source](config, store, policy_round)
    arguments = {
        "store": store,
        "folder": folder,
        "source": source,
        "seed": seed_of(config.run.seed, stage, policy_round),
        "job": uuid.uuid4().hex,
        "num_engines": config.generate.num_engines,
        "json_factors": json_factors(config.prompt, config.generate),
        **more,
    }
    section = config.generate
    # Two batches' worth of samples, and two shards more: a shard ends with its longest sample, and until then the next
    # ones must not run out.
    wanted = math.ceil(2 * source.batch / max(1, samples_per_shard)) if source.batch else 1
    return Pool(
        worker,
        arguments,
        size=section.num_engines,
        num_cpus=section.cpus_per_engine if source.num_cpus is None else source.num_cpus,
        num_gpus=source.num_gpus,
        env=source.env,
        shards_at_once=min(max(wanted, 2) + 2, MAX_SHARDS_AT_ONCE) if source.batch else 1,
        max_restarts=-1 if source.dies else 3,  # `attempts` bounds them by what they are about
    )
