"""Knowledge vectors: one text per user from policy r, then its encoding; validation users get N samples.

Two actor pools, writers of text then encoders, so that both work at once. Items are described by their own title and
attributes and do not change with the policy: they are encoded once, in round 0. Rounds after 0 write N texts for each
validation user, because their mean reward decides whether the round helped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from dpo4rec_ray.artifacts import RunDir, write_part
from dpo4rec_ray.config import Config
from dpo4rec_ray.knowledge.encoder import TextEncoder
from dpo4rec_ray.knowledge.prompts import item_text
from dpo4rec_ray.stages.common import WORKER_ENV, Outcome, Progress, say
from dpo4rec_ray.stages.sampling import TextSampler, engine_pool
from dpo4rec_ray.stages.shards import Pool, Row, run_shards, shard_ranges

ITEMS_PER_SHARD = 2048


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `knowledge` of the round: users always, items in round 0."""
    folder = store.start("knowledge", round_id)
    rows = 0
    if round_id == 0:
        rows += _encode_items(config, store, str(folder))
    num_users = store.require("users").rows
    ranges = shard_ranges(num_users, config.generate.users_per_shard)
    shards = [(shard, low, high) for shard, (low, high) in enumerate(ranges)]
    num_valid = config.generate.num_samples if round_id else 1
    pools = [
        engine_pool(
            config, store, TextSampler, round_id, {"train": 1, "valid": num_valid, "test": 1}, "encode"
        ),
        encoder_pool(
            config, VectorWriter, folder=str(folder), round_id=round_id, subject="user", first_part=0
        ),
    ]
    answers = run_shards(shards, pools, Progress("encode", num_users, "users"))
    failed = sorted(user for answer in answers for user in answer["failed"])
    if failed:
        say(f"  encode: {len(failed)} users got no text and carry the empty text's vector: {failed[:5]}")
    rows += sum(answer["rows"] for answer in answers)
    return Outcome(rows_in=num_users, rows_out=rows, figures={"failed": failed})


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
                "subject_id": np.asarray(row["user_ids"], np.int64),
                "sample_id": np.asarray(row["sample_ids"], np.int32),
                "text": texts,
                "vector": pa.FixedSizeListArray.from_arrays(
                    pa.array(vectors.reshape(-1)), vectors.shape[1]
                ).cast(pa.list_(pa.float32())),
            }
        )
        write_part(self._folder, "knowledge", table, self._first_part + int(row["shard"]))
        return {
            "shard": int(row["shard"]),
            "users": int(row["users"]),
            "rows": len(texts),
            "failed": list(row["failed"]),
        }


class ItemTexts:
    """Reads a range of the catalogue and says what is encoded for each item."""

    def __init__(self, store: RunDir):
        self._store = store

    def __call__(self, row: Row) -> Row:
        low, high = int(row["low"]), int(row["high"])
        items = self._store.read("items").slice(low, high - low).to_pylist()
        return {
            **row,
            "users": len(items),
            "user_ids": [item["item_id"] for item in items],
            "sample_ids": [0] * len(items),
            "texts": [item_text(item["title"], item["attributes"]) for item in items],
            "failed": [],
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


def _encode_items(config: Config, store: RunDir, folder: str) -> int:
    num_items = store.require("items").rows
    ranges = shard_ranges(num_items, ITEMS_PER_SHARD)
    first_part = len(shard_ranges(store.require("users").rows, config.generate.users_per_shard))
    pools = [
        Pool(ItemTexts, {"store": store}, size=1, num_cpus=0.1),
        encoder_pool(config, VectorWriter, folder=folder, round_id=0, subject="item", first_part=first_part),
    ]
    shards = [(shard, low, high) for shard, (low, high) in enumerate(ranges)]
    answers = run_shards(shards, pools, Progress("encode items", num_items, "items"))
    return sum(answer["rows"] for answer in answers)
