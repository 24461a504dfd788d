"""The actors of generate and encode that turn a shard of users (or items) into texts, and their pool.

An actor works on several shards at the same time, so that its engine stays full while one shard's last samples are
written and another's prompts are read. It takes the next shard when its engine runs out of samples (ShardWriter.has_room).
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Set
from typing import Any

import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.knowledge.prompts import item_text
from dpo4rec_ray.store.artifacts import RunDir, part_file, part_notes, write_part
from dpo4rec_ray.store.schemas import SCHEMAS
from dpo4rec_ray.store.user_rows import TakesPart, UserRows, held_out
from dpo4rec_ray.texts.shard_writer import ShardTexts, ShardWriter, WritingJob
from dpo4rec_ray.texts.sources import SOURCES
from dpo4rec_ray.texts.text_source import Row
from dpo4rec_ray.workers.shards import Pool
from dpo4rec_ray.workers.stage_workers import ENGINE_KEYS

MAX_SHARDS_AT_ONCE = 16


class Sampler:
    """What `FromQueue` asks a worker with a `ShardWriter` (Roomy)."""

    writer: ShardWriter

    def has_room(self, shards: Set[int]) -> bool:
        return self.writer.has_room(shards)

    def users_inside(self) -> int:
        return self.writer.users_inside()


class UserSampler(Sampler):
    """Reads the users of a shard and has their texts written."""

    def __init__(
        self,
        job: WritingJob,
        num_samples: dict[str, int],
        takes_part: TakesPart | None = None,
    ):
        """num_samples: per split; users of other splits are left out. takes_part: None: all do."""
        self.job, self.writer = job, ShardWriter(job)
        self._num_samples, self._takes_part = num_samples, takes_part
        self._users = UserRows(job.store, tuple(num_samples))

    def sample(self, shard: int, low: int, high: int) -> ShardTexts:
        """Texts about the users with low <= user_id < high."""
        table = self._users.read(low, high)
        if self._takes_part is not None:
            table = table.filter(pa.array(self._takes_part(table["user_id"].to_numpy(), held_out(table))))
        rows = table.to_pylist()
        seeds = [seed_of(self.job.seed, row["user_id"]) for row in rows]
        return self.writer.write(shard, rows, seeds, [self._num_samples[row["split"]] for row in rows])


class ShardGenerator(UserSampler):
    """Commits a shard's samples as one part of `generations`. Users without all their samples are only in `failed`."""

    def __call__(self, row: Row) -> Row:
        shard, job, writer = int(row["shard"]), self.job, self.writer
        if part_file(job.folder, shard).exists():  # an actor died after it had written the part
            return {"shard": shard, **part_notes(part_file(job.folder, shard))[1], **writer.engine_row()}
        found = self.sample(shard, int(row["low"]), int(row["high"]))
        columns: dict[str, list[Any]] = {name: [] for name in SCHEMAS["generations"].names}
        for user_id, one, count in zip(found.ids, found.answers, found.counts, strict=True):
            if one.reason:
                continue
            assert len(one.samples) == count
            columns["round"] += [job.round_id] * count
            columns["user_id"] += [user_id] * count
            columns["sample_id"] += range(count)
            columns["prompt_token_ids"] += [one.prompt_token_ids] * count
            columns["token_ids"] += [sample.token_ids for sample in one.samples]
            columns["text"] += [sample.text for sample in one.samples]
            columns["finish_reason"] += [sample.finish_reason for sample in one.samples]
            columns["token_logps"] += [sample.token_logps for sample in one.samples]
        write_part(job.folder, "generations", pa.table(columns), shard, found.totals)
        return {"shard": shard, **found.totals, **writer.engine_row()}


class TextSampler(UserSampler):
    """Passes a shard's texts on to the pool of encoders."""

    def __call__(self, row: Row) -> Row:
        shard = int(row["shard"])
        found = self.sample(shard, int(row["low"]), int(row["high"]))
        columns: dict[str, list[Any]] = {"subject_ids": [], "sample_ids": [], "texts": []}
        for user_id, one, count in zip(found.ids, found.answers, found.counts, strict=True):
            # Every user needs a vector. A missing text is encoded as an empty one, and the user is in `failed`.
            own = [sample.text for sample in one.samples]
            columns["texts"] += own + [""] * (count - len(own))
            columns["subject_ids"] += [user_id] * count
            columns["sample_ids"] += range(count)
        return {
            "shard": shard,
            "subject": "user",
            **columns,
            "totals": {**found.totals, **self.writer.engine_row()},
        }


class ItemSampler(Sampler):
    """Describes a range of the catalogue. An item without a description is encoded by its own title and attributes."""

    def __init__(self, job: WritingJob, first_part: int):
        """first_part: number of the part that shard 0 becomes; the users' parts come before it."""
        self._job, self.writer, self._first_part = job, ShardWriter(job, "item"), first_part
        self._items = job.store.read("items")

    def has_room(self, shards: Set[int]) -> bool:
        return super().has_room({self._first_part + shard for shard in shards})

    def __call__(self, row: Row) -> Row:
        low, high = int(row["low"]), int(row["high"])
        rows = self._items.slice(low, high - low).to_pylist()
        seeds = [seed_of(self._job.seed, "item", item["item_id"]) for item in rows]
        found = self.writer.write(self._first_part + int(row["shard"]), rows, seeds, [1] * len(rows))
        return {
            "shard": row["shard"],
            "subject": "item",
            "subject_ids": found.ids,
            "sample_ids": [0] * len(rows),
            "texts": [
                item_text(item["title"], item["attributes"]) if one.reason else one.samples[0].text
                for item, one in zip(rows, found.answers, strict=True)
            ],
            "totals": {**found.totals, **self.writer.engine_row()},
        }


def text_pool(
    config: Config,
    store: RunDir,
    worker: type,
    *,
    stage: str,
    round_id: int,
    policy_round: int,
    folder: str,
    samples_per_shard: int,
    **arguments: Any,
) -> Pool:
    """The pool that writes policy `policy_round`'s texts for `folder`, which holds an artifact of round `round_id`.

    worker: ShardGenerator, TextSampler or ItemSampler; arguments: what it takes beside the job.
    samples_per_shard: about how many samples a shard needs.
    """
    section, writer = config.generate, SOURCES[config.llm.source]
    placement = writer.placement(config, store, policy_round)
    seed = seed_of(config.run.seed, stage, policy_round)
    job = WritingJob(
        config, store, placement, round_id, folder, stage, samples_per_shard, seed, start_id=uuid.uuid4().hex
    )
    # A shard ends with its longest sample, when most of its others have long been there: so an engine is full of the rests of
    # many shards. How many there are at once follows from its room; these are the threads for them.
    shards = math.ceil(4 * placement.batch / max(1, samples_per_shard))
    return Pool(
        worker,
        {"job": job, **arguments},
        size=section.num_engines,
        num_cpus=section.cpus_per_engine if placement.num_cpus is None else placement.num_cpus,
        num_gpus=placement.num_gpus,
        env=placement.env,
        shards_at_once=min(shards + 2, MAX_SHARDS_AT_ONCE) if placement.batch else 1,
        prepare=placement.prepare,
        max_restarts=-1 if placement.dies else 3,  # -1: `attempts` decides when there were too many
        min_size=section.min_engines,
        where=None if placement.kept else section,
        what="engines",
        keys=ENGINE_KEYS,
        over_nodes=section.over_nodes and placement.num_gpus > 0,
    )
