"""Texts that are counted and not written: from each user's history, and from later likes, which only measures a ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.knowledge.statistics import StatisticsGenerator
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.user_rows import liked_items
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
            config.like_at,
        )

    def __call__(self, row: Row) -> Row:
        config, shard = self._config, self._shards[int(row["shard"])]
        columns = ["user_id", "split", "history_item_ids", "history_ratings"]
        own = [("user_id", ">=", shard.low), ("user_id", "<", shard.high)]
        users = self._store.read("users", where=own, columns=columns).sort_by("user_id").to_pylist()
        if shard.subject == ORACLE:
            wanted = ["user_id", "candidate_item_ids", "labels"]
            lists = self._store.read("lists", split=("train", "valid"), where=own, columns=wanted)
            users = _with_later_likes(users, liked_items(lists), config.data.positive_rating)
        answers = self._statistics.generate(
            [user["history_item_ids"] for user in users],
            [user["history_ratings"] for user in users],
            [seed_of(config.run.seed, shard.subject, user["user_id"]) for user in users],
            # Several texts of a training user let a reranker read one user in several ways.
            [config.reward.reader_texts if user["split"] == "train" else 1 for user in users],
            whole_first=True,
        )
        found: dict[str, list[Any]] = {"subject_ids": [], "sample_ids": [], "texts": []}
        for user, answer in zip(users, answers, strict=True):
            found["subject_ids"] += [user["user_id"]] * len(answer.samples)
            found["sample_ids"] += range(len(answer.samples))
            found["texts"] += [sample.text for sample in answer.samples]
        return {"shard": row["shard"], "subject": shard.subject, **found, "totals": {"users": len(users)}}


def _with_later_likes(
    users: list[dict[str, Any]], liked: dict[int, list[int]], like_at: float
) -> list[dict[str, Any]]:
    """Users with the items that they like in their training and validation lists as their history; others are left out."""
    return [
        {**user, "history_item_ids": list(own), "history_ratings": [like_at] * len(own)}
        for user in users
        if (own := dict.fromkeys(liked.get(user["user_id"], ())))
    ]
