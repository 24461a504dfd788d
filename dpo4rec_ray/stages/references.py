"""Texts that the LLM's are compared with, and that rerankers learn to read from: counted, not written (config.counted_texts).

Statistical texts cost no LLM, say what they know in one form, and are what every LLM has to beat. Oracle texts are made from
what training and validation users like later; they measure what a perfect text would bring and are in no result.
"""

from __future__ import annotations

import numpy as np

from dpo4rec_ray.config import Config
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.texts.accounts import knowledge_counts
from dpo4rec_ray.texts.counted_texts import CountedShard, CountedTexts
from dpo4rec_ray.texts.throughput import stream_texts
from dpo4rec_ray.texts.vectors import VectorWriter, encoder_pool
from dpo4rec_ray.workers.shards import Pool, count_users, resume_parts, shard_ranges, without

USERS_PER_SHARD = 256


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `references`: one text of each kind per user, several for training users with reward.reader_texts."""
    folder = store.path("references")
    done = resume_parts(folder, store.fingerprint)
    ranges = shard_ranges(store.require("users").rows, USERS_PER_SHARD)
    subjects = config.counted_texts
    shards = [CountedShard(subject, low, high) for subject in subjects for _, low, high in ranges.tolist()]
    every = np.tile(ranges, (len(subjects), 1))
    every[:, 0] = np.arange(len(every))
    todo = without(every, done)
    total, left = count_users(every), count_users(todo)
    if len(todo):
        writers = Pool(
            CountedTexts, {"config": config, "store": store, "shards": shards}, size=1, num_cpus=0.1
        )
        encoders = encoder_pool(config, VectorWriter, folder=str(folder), round_id=0)
        stream_texts("references", "users", todo, [writers, encoders], total, total - left)
    rows, counts = knowledge_counts(folder)
    return Outcome(
        rows_in=total,
        rows_out=rows,
        stats={"texts": {subject: counts[subject]["users"] for subject in config.counted_texts}},
    )
