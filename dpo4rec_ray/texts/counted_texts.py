"""Texts that are counted and not written: from each user's history, and from later likes, which only measures a ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.knowledge.statistics import StatisticsGenerator
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.texts.text_source import catalogue
from dpo4rec_ray.workers.shards import Row

ORACLE = "oracle"


@dataclass(frozen=True)
class CountedShard:
    """Users `low` to `high` and what is counted about them: "statistics" or ORACLE."""

    subject: str
    low: int
    high: int


class CountedTexts:
    """Counts the texts of a shard: several for a training user where reward.reader_texts says so, one for all others."""

    def __init__(self, config: Config, store: RunDir, shards: Sequence[CountedShard]):
        """shards: what a row's "shard" is the number of."""
        self._config, self._store, self._shards = config, store, shards
        items = catalogue(store)
        self._statistics = StatisticsGenerator(
            items["title"].to_pylist(),
            items["attributes"].to_pylist(),
            config.data.positive_rating if config.prompt.ratings else None,
        )

    def __call__(self, row: Row) -> Row:
        config, shard = self._config, self._shards[int(row["shard"])]
        columns = ["user_id", "split", "history_item_ids", "history_ratings"]
        users = (
            self._store.read("users", columns=columns).slice(shard.low, shard.high - shard.low).to_pylist()
        )
        if shard.subject == ORACLE:
            users = _with_later_likes(self._store, users, config.data.positive_rating)
        answers = self._statistics.generate(
            [user["history_item_ids"] for user in users],
            [user["history_ratings"] for user in users],
            [seed_of(config.run.seed, shard.subject, user["user_id"]) for user in users],
            # Several texts of a training user let a reranker read one user in several ways.
            [config.reward.reader_texts if user["split"] == "train" else 1 for user in users],
            whole_first=True,
        )
        columns = {"subject_ids": [], "sample_ids": [], "texts": []}
        for user, answer in zip(users, answers, strict=True):
            columns["subject_ids"] += [user["user_id"]] * len(answer.samples)
            columns["sample_ids"] += range(len(answer.samples))
            columns["texts"] += [sample.text for sample in answer.samples]
        return {"shard": row["shard"], "subject": shard.subject, **columns, "totals": {"users": len(users)}}


def _with_later_likes(store: RunDir, users: list[dict[str, Any]], like_at: float) -> list[dict[str, Any]]:
    """Training and validation users with the items that they like in their lists as their history. Never test users."""
    lists = store.read("lists", split=("train", "valid"), columns=["user_id", "candidate_item_ids", "labels"])
    wanted = {user["user_id"] for user in users if user["split"] != "test"}
    liked: dict[int, dict[int, None]] = {user: {} for user in wanted}
    for row in lists.filter(pc.is_in(lists["user_id"], pa.array(sorted(wanted), pa.int64()))).to_pylist():
        pairs = zip(row["candidate_item_ids"], row["labels"], strict=True)
        liked[row["user_id"]].update({item: None for item, label in pairs if label > 0})
    return [
        {**user, "history_item_ids": list(own), "history_ratings": [like_at] * len(own)}
        for user in users
        if (own := liked.get(user["user_id"]))
    ]
