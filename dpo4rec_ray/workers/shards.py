"""Streaming users through actor pools, shard by shard, so that a crash loses at most the shards in flight.

A shard is a fixed range of user ids. Ray Data sees one row per shard: the first actor reads its users, the last one
writes one Parquet part named after the shard and returns only counts. Blocks are never merged or split on the way,
because every actor takes exactly one shard per call. (Ray 2.60 merges small blocks, and its own checkpoint reads all
finished ids into memory.)
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from dpo4rec_ray.config.placed import Placed
from dpo4rec_ray.storage.places import Place, remove, write_text
from dpo4rec_ray.store.artifacts import MANIFEST
from dpo4rec_ray.store.progress import Progress, say
from dpo4rec_ray.workers.needs import Groups, Needs
from dpo4rec_ray.workers.phases import starting
from dpo4rec_ray.workers.placement import WORKER_ENV, check_room, pool_workers
from dpo4rec_ray.workers.room import Workers

Row = dict[str, Any]
MAX_RESTARTS = 3  # of an actor whose process died, and of the shards it was working on


@dataclass(frozen=True)
class Pool:
    """An actor pool: an ordinary class, how it is built, and what each actor occupies.

    Attributes:
        size: number of actors, at most.
        min_size: number of actors to begin with and to keep; more come while shards wait. 0: all at once.
        where: the section of the recipe that says what their nodes must have. None: any node will do.
        what, keys: the actors in plain words, and the recipe's keys that set what they take.
        over_nodes: each GPU of an actor may be on another node.
        shards_at_once: calls that an actor works on at the same time, each in a thread of its own.
        max_restarts: of an actor. -1: the worker itself says when it has died too often.
        prepare: called before the actors start.
    """

    worker: type[Callable[[Row], Row]]
    arguments: dict[str, Any]
    size: int
    num_cpus: float
    num_gpus: float = 0.0
    env: dict[str, str] = field(default_factory=lambda: WORKER_ENV)
    shards_at_once: int = 1
    max_restarts: int = MAX_RESTARTS
    prepare: Callable[[], None] | None = None
    min_size: int = 0
    where: Placed | None = None
    what: str = ""
    keys: str = ""
    over_nodes: bool = False

    @property
    def needs(self) -> Needs:
        return Needs.of(self.where, self.num_cpus, self.num_gpus, over_nodes=self.over_nodes)

    @property
    def workers(self) -> Workers:
        """For the room that the actors need."""
        return pool_workers(
            self.what or f"actors of {self.worker.__name__}", self.size, self.needs, self.keys, self.min_size
        )


def shard_ranges(num_users: int, users_per_shard: int) -> list[tuple[int, int]]:
    """User id ranges [low, high), one per shard."""
    return [(low, min(low + users_per_shard, num_users)) for low in range(0, num_users, users_per_shard)]


def part_number(file: Place) -> int:
    """The shard that wrote a Parquet part."""
    return int(file.stem.removeprefix("part-"))


def resume_parts(folder: Place, fingerprint: str) -> set[int]:
    """Open a folder for parts, before the first is written, and note which work they belong to.

    Returns:
        The shards that an interrupted run of the same work has committed; their parts stay. If there are none, or the
        artifact is complete or another's, the folder is emptied.
    """
    note = folder / "shards.fingerprint"
    same = not (folder / MANIFEST).exists() and note.exists() and note.read_text() == fingerprint
    done = {part_number(file) for file in folder.glob("part-*.parquet")} if same else set[int]()
    if not done:
        (folder / MANIFEST).unlink(missing_ok=True)  # first: without it the artifact is not complete
        remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(note, fingerprint)
    for left in folder.glob("*.tmp*"):  # from writers that were killed
        left.unlink(missing_ok=True)
    return done


def run_shards(
    shards: Sequence[tuple[int, int, int]],
    pools: Sequence[Pool],
    progress: Progress,
    *,
    already: int = 0,
    extra: Callable[[Row], str] | None = None,
) -> Iterator[Row]:
    """Send (shard, low, high) through the pools in turn; yields the last pool's answer for each shard when it is done.

    Each answer has the number of its users (or items) under "users"; an earlier run has done `already` of them.
    extra: takes an answer and returns what the progress line shows beside the number.

    Raises:
        UserError: the pools' actors can never be placed (`check_room`).
    """
    import ray
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    rows = [{"shard": shard, "low": low, "high": high} for shard, low, high in shards]
    if not rows:
        return
    fitting = check_room(*(pool.workers for pool in pools))
    for pool, fits in zip(pools, fitting, strict=True):
        if fits < pool.size and not pool.min_size:
            say(f"  room for {fits} of {pool.size} {pool.workers.what}; the others start when nodes come")
    pools = [
        # No actor without a shard. What has no room now must not take that of the next pool.
        replace(pool, size=min(pool.size, len(rows)), min_size=min(pool.min_size or fits, len(rows)))
        for pool, fits in zip(pools, fitting, strict=True)
    ]
    groups, context = Groups(), ray.data.DataContext.get_current()
    # Otherwise a pool whose actors are all busy would not grow: its queues are short (`max_tasks_in_flight_per_actor`).
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    # Otherwise a worker's UserError comes back as Ray's own exception, which loses its cause between processes.
    context.raise_original_map_exception = True
    # One table is one block and so one task. (from_items merges blocks; a repartition needs a CPU of its own.)
    dataset = ray.data.from_arrow([pa.table({key: [value] for key, value in row.items()}) for row in rows])
    for pool in pools:
        # Ray 2.60 has no other way to bound restarts; without a bound it restarts for ever.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RayDeprecationWarning)
            dataset = dataset.map(
                pool.worker,
                fn_constructor_kwargs=pool.arguments,
                compute=ray.data.ActorPoolStrategy(
                    min_size=pool.min_size,
                    max_size=pool.size,
                    max_tasks_in_flight_per_actor=pool.shards_at_once + 1,
                    max_concurrent_calls_per_actor=pool.shards_at_once,
                    enable_true_multi_threading=pool.shards_at_once > 1,
                ),
                **pool.needs.options(),
                ray_remote_args_fn=groups.option(pool.needs),
                runtime_env={"env_vars": pool.env},
                max_restarts=pool.max_restarts,
                max_task_retries=pool.max_restarts,
            )
    progress.starting = starting(
        sum(pool.min_size for pool in pools),
        min(pool.num_cpus for pool in pools),
        max(pool.num_gpus for pool in pools),
    )
    done = already
    with progress, contextlib.closing(groups):
        for pool in pools:
            if pool.prepare:
                pool.prepare()
        for row in dataset.iter_rows():
            done += row["users"]
            progress.at(done, extra(row) if extra else "")
            yield row
