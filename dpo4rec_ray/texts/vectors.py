"""The pool of text encoders: texts to knowledge vectors, one part of `knowledge` per shard."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.texts import EncoderSection
from dpo4rec_ray.knowledge.encoder import TextEncoder
from dpo4rec_ray.knowledge.prompts import item_text
from dpo4rec_ray.store.artifacts import RunDir, write_part
from dpo4rec_ray.texts.throughput import COUNTS
from dpo4rec_ray.workers.phases import READY, phase
from dpo4rec_ray.workers.placement import without_sklearn
from dpo4rec_ray.workers.shards import Pool, Row
from dpo4rec_ray.workers.stage_workers import ENCODER_KEYS


class ItemTexts:
    """Reads a range of the catalogue; each item is encoded by its own title and attributes."""

    def __init__(self, store: RunDir):
        self._store = store

    def __call__(self, row: Row) -> Row:
        low, high = int(row["low"]), int(row["high"])
        items = self._store.read("items").slice(low, high - low).to_pylist()
        return {
            "shard": row["shard"],
            "subject": "item",
            "subject_ids": [item["item_id"] for item in items],
            "sample_ids": [0] * len(items),
            "texts": [item_text(item["title"], item["attributes"]) for item in items],
            "totals": {"users": len(items)},
        }


def open_encoder(section: EncoderSection) -> TextEncoder:
    """The encoder of this worker."""
    without_sklearn()
    phase("loading the text encoder")
    encoder = TextEncoder(section)
    phase(READY)
    return encoder


class VectorWriter:
    """Encodes a shard's texts and commits them as one part of `knowledge`."""

    def __init__(self, encoder: EncoderSection, folder: str, round_id: int, first_part: int = 0):
        """first_part: number of the part that shard 0 becomes. A row names the subject of its texts (texts.accounts)."""
        self._encoder = open_encoder(encoder)
        self._folder, self._round, self._first_part = folder, round_id, first_part

    def __call__(self, row: Row) -> Row:
        texts, subject = list(row["texts"]), str(row["subject"])
        vectors = self._encoder.encode(texts)
        table = pa.table(
            {
                "round": np.full(len(texts), self._round, np.int32),
                "subject": [subject] * len(texts),
                "subject_id": np.asarray(row["subject_ids"], np.int64),
                "sample_id": np.asarray(row["sample_ids"], np.int32),
                "text": texts,
                "vector": pa.FixedSizeListArray.from_arrays(
                    pa.array(vectors.reshape(-1)), vectors.shape[1]
                ).cast(pa.list_(pa.float32())),
            }
        )
        totals = dict(row["totals"])
        notes = {"subject": subject, **{name: totals[name] for name in COUNTS if totals.get(name)}}
        write_part(self._folder, "knowledge", table, self._first_part + int(row["shard"]), notes)
        return {"shard": int(row["shard"]), **totals}


def encoder_pool(config: Config, worker: type, **arguments: Any) -> Pool:
    """The pool of `worker`, which takes the encoder section and `arguments`."""
    section = config.encoder
    return Pool(
        worker,
        {"encoder": section, **arguments},
        section.num_workers,
        section.cpus_per_worker,
        num_gpus=section.gpus_per_worker,
        where=section,
        what="encoders",
        keys=ENCODER_KEYS,
    )
