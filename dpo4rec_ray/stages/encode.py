"""Knowledge vectors: one text per user from policy r, then its encoding; validation users get N samples.

Two actor pools, writers of text then encoders, so that both work at once. Items are described once, in round 0: by their
own title and attributes, or by the base LLM (`prompt.describe_items`); they do not change with the policy. Rounds after 0
write N texts for each validation user, because their mean reward decides whether the round helped. Finished shards
survive a kill.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.knowledge.encoder import TextEncoder
from dpo4rec_ray.knowledge.prompts import item_text
from dpo4rec_ray.store.artifacts import RunDir, part_notes, write_part
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import Progress, say
from dpo4rec_ray.texts.sampling import ItemSampler, TextSampler, engine_pool
from dpo4rec_ray.texts.sources import cost_of, describes_items
from dpo4rec_ray.texts.throughput import COUNTS, Throughput
from dpo4rec_ray.workers.placement import WORKER_ENV
from dpo4rec_ray.workers.shards import Pool, Row, begin_shards, finished_shards, run_shards, shard_ranges

ITEMS_PER_SHARD = 2048
DESCRIBED_PER_SHARD = 256  # items that an LLM describes: minutes of work, not seconds
SUBJECTS = ("user", "item")


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `knowledge` of the round: users always, items in round 0. Items come first; their parts after the users'."""
    folder = store.path("knowledge", round_id)
    size = config.generate.users_per_shard
    fingerprint = f"{store.fingerprint} {size}"
    done = finished_shards(folder, fingerprint)
    store.start("knowledge", round_id, keep=bool(done))
    begin_shards(folder, fingerprint)
    num_users = store.require("users").rows
    ranges = shard_ranges(num_users, size)
    stats: dict[str, Any] = {}
    if round_id == 0:
        stats["items"] = _encode_items(config, store, folder, len(ranges), done)
    num_valid = config.generate.num_samples if round_id else 1

    def pools() -> list[Pool]:
        writers = engine_pool(
            config,
            store,
            TextSampler,
            round_id,
            "encode",
            folder=str(folder),
            samples_per_shard=size,
            num_samples={"train": 1, "valid": num_valid, "test": 1},
            round_id=round_id,
        )
        arguments = {"folder": str(folder), "round_id": round_id, "subject": "user", "first_part": 0}
        return [writers, encoder_pool(config, VectorWriter, **arguments)]

    todo = [(shard, *ranges[shard]) for shard in range(len(ranges)) if shard not in done]
    already = num_users - sum(high - low for _, low, high in todo)
    if already:
        say(f"  encode: {already} users kept from an interrupted run")
    stats["this_run"] = _stream("encode", "users", todo, pools, num_users, already)
    rows, counts = _account(folder)
    users = counts["user"]
    if users["failed"]:
        say(f"  encode: {users['failed']} users got no text and carry the empty text's vector")
    if users["shortened"]:
        say(f"  encode: {users['shortened']} prompts leave out their oldest events to fit llm.max_model_len")
    if counts["item"]["failed"]:
        say(f"  encode: {counts['item']['failed']} items got no text and are encoded by their own title")
    items = {name: count for name, count in counts["item"].items() if name != "users"}
    if items:
        stats["items"] |= items
    stats |= cost_of(config, users + counts["item"])
    stats |= {**users, "simulated": config.llm.source == "template"}
    return Outcome(rows_in=num_users, rows_out=rows, stats=stats)


class VectorWriter:
    """Encodes a shard's texts and commits them as one part of `knowledge`."""

    def __init__(self, folder: str, round_id: int, subject: str, first_part: int, **encoder: Any):
        self._encoder = TextEncoder(**encoder)
        self._folder, self._round, self._subject, self._first_part = folder, round_id, subject, first_part

    def __call__(self, row: Row) -> Row:
        texts = list(row["texts"])
        vectors = self._encoder.encode(texts)
        table = pa.table(
            {
                "round": np.full(len(texts), self._round, np.int32),
                "subject": [self._subject] * len(texts),
                "subject_id": np.asarray(row["subject_ids"], np.int64),
                "sample_id": np.asarray(row["sample_ids"], np.int32),
                "text": texts,
                "vector": pa.FixedSizeListArray.from_arrays(
                    pa.array(vectors.reshape(-1)), vectors.shape[1]
                ).cast(pa.list_(pa.float32())),
            }
        )
        totals = dict(row["totals"])
        notes = {"subject": self._subject, **{name: totals[name] for name in COUNTS if totals.get(name)}}
        write_part(self._folder, "knowledge", table, self._first_part + int(row["shard"]), notes)
        return {"shard": int(row["shard"]), **totals}


class ItemTexts:
    """Reads a range of the catalogue and says what is encoded for each item."""

    def __init__(self, store: RunDir):
        self._store = store

    def __call__(self, row: Row) -> Row:
        low, high = int(row["low"]), int(row["high"])
        items = self._store.read("items").slice(low, high - low).to_pylist()
        return {
            "shard": row["shard"],
            "subject_ids": [item["item_id"] for item in items],
            "sample_ids": [0] * len(items),
            "texts": [item_text(item["title"], item["attributes"]) for item in items],
            "totals": {"users": len(items)},
        }


def encoder_pool(config: Config, worker: type, **arguments: Any) -> Pool:
    """The pool of text encoders that ends in `worker`."""
    section = config.encoder
    settings = {"path": section.path, "batch_size": section.batch_size, "max_tokens": section.max_tokens}
    return Pool(
        worker,
        {**settings, **arguments},
        section.num_workers,
        section.cpus_per_worker,
        num_gpus=section.gpus_per_worker,
        env=WORKER_ENV,
    )


def _encode_items(
    config: Config, store: RunDir, folder: Path, first_part: int, done: set[int]
) -> dict[str, Any]:
    """Their texts and vectors; an empty dict where all were there already."""
    num_items = store.require("items").rows
    described = describes_items(config)
    ranges = shard_ranges(num_items, DESCRIBED_PER_SHARD if described else ITEMS_PER_SHARD)
    todo = [(shard, *ranges[shard]) for shard in range(len(ranges)) if first_part + shard not in done]

    def pools() -> list[Pool]:
        writers = Pool(ItemTexts, {"store": store}, size=1, num_cpus=0.1)
        if described:
            writers = engine_pool(
                config,
                store,
                ItemSampler,
                0,
                "encode",
                folder=str(folder),
                samples_per_shard=DESCRIBED_PER_SHARD,
                round_id=0,
                first_part=first_part,
            )
        arguments = {"folder": str(folder), "round_id": 0, "subject": "item", "first_part": first_part}
        return [writers, encoder_pool(config, VectorWriter, **arguments)]

    already = num_items - sum(high - low for _, low, high in todo)
    return _stream("encode items", "items", todo, pools, num_items, already)


def _stream(
    label: str,
    unit: str,
    todo: list[tuple[int, int, int]],
    pools: Callable[[], list[Pool]],
    total: int,
    already: int,
) -> dict[str, Any]:
    """Run the shards; the engines' figures. Where nothing is left to do no engine is started."""
    if not todo:
        return {}
    placed = pools()
    throughput = Throughput(placed[0].size)

    def extra(answer: Row) -> str:
        throughput.add(answer)
        return throughput.line

    progress = Progress(label, total, unit, already=already)
    for _ in run_shards(todo, placed, progress, already=already, extra=extra):
        pass
    return throughput.stats


def _account(folder: Path) -> tuple[int, dict[str, Counter[str]]]:
    """Rows, and counts per subject, over all parts, from their footers."""
    rows, counts = 0, {subject: Counter[str]() for subject in SUBJECTS}
    for file in folder.glob("part-*.parquet"):
        own, notes = part_notes(file)
        rows += own
        counts[notes.pop("subject")].update(notes)
    return rows, counts
