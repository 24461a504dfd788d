"""Knowledge vectors: one text per user from policy r, then its encoding; test and validation users get several.

Two actor pools, writers of text then encoders, so that both work at the same time. Items are encoded once, in round 0,
because they do not change with the policy: by their own title and attributes, or by a text of the source. Rounds after 0
write N texts for each validation user, because their mean reward decides whether the round helped. Finished shards
survive a kill.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from dpo4rec_ray.config import Config
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.texts.accounts import cost_of, knowledge_counts
from dpo4rec_ray.texts.sampling import ItemSampler, TextSampler, text_pool
from dpo4rec_ray.texts.sources import describes_items
from dpo4rec_ray.texts.throughput import stream_texts
from dpo4rec_ray.texts.vectors import ItemTexts, VectorWriter, encoder_pool
from dpo4rec_ray.workers.shards import Pool, count_users, resume_parts, shard_ranges, without

ITEMS_PER_SHARD = 2048
DESCRIBED_PER_SHARD = 256  # items that an LLM describes: minutes of work, not seconds


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `knowledge` of the round: users always, items in round 0. Items come first; their parts after the users'."""
    folder, size = store.path("knowledge", round_id), config.generate.users_per_shard
    done = resume_parts(folder, f"{store.fingerprint} {size}")
    num_users = store.require("users").rows
    ranges = shard_ranges(num_users, size)
    stats: dict[str, Any] = {}
    todo = without(ranges, done)
    # First, because engines that are kept start meanwhile.
    writers = _user_texts(config, store, folder, round_id) if len(todo) else None
    if round_id == 0:
        stats["items"] = _encode_items(config, store, folder, len(ranges), done)
    already = num_users - count_users(todo)
    if already:
        say(f"  encode: {already} users kept from an interrupted run")
    stats["this_run"] = {}
    if writers:
        encoders = encoder_pool(config, VectorWriter, folder=str(folder), round_id=round_id)
        stats["this_run"] = stream_texts("encode", "users", todo, [writers, encoders], num_users, already)
    rows, counts = knowledge_counts(folder)
    _say(counts)
    users, items = counts["user"], counts["item"]
    if named := {name: count for name, count in items.items() if name != "users"}:
        stats["items"] |= named
    stats |= cost_of(config, users + items)
    stats |= {**users, "simulated": config.llm.source == "template"}
    return Outcome(rows_in=num_users, rows_out=rows, stats=stats)


def _user_texts(config: Config, store: RunDir, folder: Path, round_id: int) -> Pool:
    """The pool that writes the users' texts."""
    num_valid = config.generate.num_samples if round_id else 1
    num_train = config.reward.reader_texts if not round_id and config.reads_own_texts else 1
    return text_pool(
        config,
        store,
        TextSampler,
        stage="encode",
        round_id=round_id,
        policy_round=round_id,
        folder=str(folder),
        samples_per_shard=config.generate.users_per_shard,
        num_samples={"train": num_train, "valid": num_valid, "test": config.test_texts},
    )


def _encode_items(
    config: Config, store: RunDir, folder: Path, first_part: int, done: set[int]
) -> dict[str, Any]:
    """Write the texts and vectors of the items; the stats of their engines."""
    num_items, described = store.require("items").rows, describes_items(config)
    ranges = shard_ranges(num_items, DESCRIBED_PER_SHARD if described else ITEMS_PER_SHARD)
    todo = without(ranges, done, first_part)
    if not len(todo):
        return {}
    writers = Pool(ItemTexts, {"store": store}, size=1, num_cpus=0.1)
    if described:
        writers = text_pool(
            config,
            store,
            ItemSampler,
            stage="encode",
            round_id=0,
            policy_round=0,
            folder=str(folder),
            samples_per_shard=DESCRIBED_PER_SHARD,
            first_part=first_part,
        )
    encoders = encoder_pool(config, VectorWriter, folder=str(folder), round_id=0, first_part=first_part)
    already = num_items - count_users(todo)
    return stream_texts("encode items", "items", todo, [writers, encoders], num_items, already)


def _say(counts: dict[str, Counter[str]]) -> None:
    users, items = counts["user"], counts["item"]
    if users["failed"]:
        say(f"  encode: {users['failed']} users got no text and are ranked without one")
    if users["shortened"]:
        say(f"  encode: {users['shortened']} prompts leave out their oldest events to fit llm.max_model_len")
    if items["failed"]:
        say(f"  encode: {items['failed']} items got no text and are encoded by their own title")
