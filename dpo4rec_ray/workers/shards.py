"""Streaming users through actor pools, shard by shard, so that a crash loses at most the shards in flight.

A shard is a fixed range of user ids. The first pool's actors take shards from a queue (shard_queue.py), read their users and
give one row per shard; the last pool writes one Parquet part named after the shard and returns only counts. Rows are never
merged on the way: each is a block of its own. (Ray 2.60's own checkpoint reads all finished ids into memory.)
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from dpo4rec_ray.config.placed import Placed
from dpo4rec_ray.storage.places import Place, remove, write_text
from dpo4rec_ray.store.artifacts import MANIFEST
from dpo4rec_ray.store.progress import Progress, say
from dpo4rec_ray.workers.needs import Groups, Needs
from dpo4rec_ray.workers.phases import starting
from dpo4rec_ray.workers.placement import WORKER_ENV, check_room, pool_workers
from dpo4rec_ray.workers.room import Workers
from dpo4rec_ray.workers.shard_queue import Row, ShardQueue, from_queue, tickets

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


def shard_ranges(num_users: int, users_per_shard: int) -> np.ndarray:
    """All shards as `run_shards` takes them: int64 [S, 3] of number, lowest user id, and the first user id after it."""
    numbers = np.arange(-(-num_users // users_per_shard))
    lows = numbers * users_per_shard
    return np.column_stack([numbers, lows, np.minimum(lows + users_per_shard, num_users)])


def without(shards: np.ndarray, done: Set[int], first_part: int = 0) -> np.ndarray:
    """The shards whose parts are not done; first_part: number of the part that shard 0 becomes."""
    return shards[~np.isin(shards[:, 0] + first_part, sorted(done))]


def count_users(shards: np.ndarray) -> int:
    """Users (or items) of these shards together."""
    return int((shards[:, 2] - shards[:, 1]).sum())


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
        note.unlink(missing_ok=True)  # then: what a kill leaves of the content is no part of it
        remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(note, fingerprint)
    for left in folder.glob("*.tmp*"):  # from writers that were killed
        left.unlink(missing_ok=True)
    return done


def run_shards(
    shards: Sequence[tuple[int, int, int]] | np.ndarray,
    pools: Sequence[Pool],
    progress: Progress,
    *,
    already: int = 0,
    extra: Callable[[Row], str] | None = None,
) -> Iterator[Row]:
    """Send shards (number, low, high) through the pools in turn; yields the last pool's answer for each shard when it is done.

    Each answer has the number of its users (or items) under "users"; an earlier run has done `already` of them.
    extra: takes an answer and returns what the progress line shows beside the number.

    Raises:
        UserError: the pools' actors can never be placed (`check_room`).
    """
    import ray
    import ray.data
    from ray.data import DataContext
    from ray.util.annotations import RayDeprecationWarning
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not len(shards):
        return
    fitting = check_room(*(pool.workers for pool in pools))
    for pool, fits in zip(pools, fitting, strict=True):
        if fits < pool.size and not pool.min_size:
            say(f"  room for {fits} of {pool.size} {pool.workers.what}; the others start when nodes come")
    pools = [
        # No actor without a shard. What has no room now must not take that of the next pool.
        replace(pool, size=min(pool.size, len(shards)), min_size=min(pool.min_size or fits, len(shards)))
        for pool, fits in zip(pools, fitting, strict=True)
    ]
    first, groups = pools[0], Groups()
    num_tickets, per_ticket = tickets(len(shards), first.size, first.shards_at_once + 1)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(ShardQueue).options(num_cpus=0, scheduling_strategy=here)
    queue = actor.remote(np.asarray(shards, np.int64), per_ticket)
    taking = {"worker": from_queue(first.worker), "arguments": {"queue": queue, **first.arguments}}
    context = DataContext.get_current().copy()
    # Otherwise a pool whose actors are all busy would not grow: its queues are short (`max_tasks_in_flight_per_actor`).
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    # Otherwise a worker's UserError comes back as Ray's own exception, which loses its cause between processes.
    context.raise_original_map_exception = True
    context.target_max_block_size = 8  # bytes: so every row is a block, and goes on as soon as it is there
    with DataContext.current(context):
        # One table is one block and so one call. (from_items merges blocks; a read or a repartition needs a CPU of its own.)
        dataset = ray.data.from_arrow([pa.table({"ticket": [ticket]}) for ticket in range(num_tickets)])
    for number, pool in enumerate(pools):
        one = replace(pool, **taking) if not number else pool
        # Ray 2.60 has no other way to bound restarts; without a bound it restarts for ever.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RayDeprecationWarning)
            dataset = (dataset.map if number else dataset.flat_map)(
                one.worker,
                fn_constructor_kwargs=one.arguments,
                compute=ray.data.ActorPoolStrategy(
                    min_size=one.min_size,
                    max_size=one.size,
                    max_tasks_in_flight_per_actor=one.shards_at_once + 1,
                    max_concurrent_calls_per_actor=one.shards_at_once,
                    enable_true_multi_threading=one.shards_at_once > 1,
                ),
                **one.needs.options(),
                ray_remote_args_fn=groups.option(one.needs),
                runtime_env={"env_vars": one.env},
                max_restarts=one.max_restarts,
                max_task_retries=one.max_restarts,
            )
    progress.starting = starting(
        sum(pool.min_size for pool in pools),
        min(pool.num_cpus for pool in pools),
        max(pool.num_gpus for pool in pools),
    )
    progress.live = partial(_progress_of, queue)
    done = already
    with contextlib.ExitStack() as stack:
        # Ray ends an actor when nothing refers to it, and Ray Data may do so long after the stage.
        stack.callback(ray.kill, queue)
        stack.enter_context(progress)
        stack.enter_context(contextlib.closing(groups))
        for pool in pools:
            if pool.prepare:
                pool.prepare()
        for row in dataset.iter_rows():
            done += row["users"]
            progress.at(done, extra(row) if extra else "")
            yield row


def _progress_of(queue: Any) -> tuple[float, int] | None:
    """For `Progress.live`: of the queue's actor."""
    import ray

    with contextlib.suppress(Exception):  # a line on the terminal must end no run
        return ray.get(queue.progress.remote(), timeout=1)
    return None
