"""What a source of texts is: a writer that is built inside an actor, and what such an actor occupies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.completions import Answer
from dpo4rec_ray.knowledge.engine_loop import EngineStats
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.workers.placement import WORKER_ENV

Row = dict[str, Any]


class TextWriter:
    """A source inside an actor, made with config and store. `users` and `items` are called from several threads."""

    # The recipe's section that this source alone reads; it counts for what has to be done again.
    section = ""

    @classmethod
    def check(cls, config: Config) -> None:
        """What can be known before anything starts. Raises UserError if the source cannot do what the recipe says."""
        if config.prompt.describe_items:
            raise UserError(
                f"prompt.describe_items = true, but llm.source = {config.llm.source!r} writes nothing about items; "
                "set it to false"
            )

    @classmethod
    def identity(cls, config: Config, store: RunDir) -> str:
        """What changes if the source would write other texts, beside the recipe."""
        raise NotImplementedError

    @classmethod
    def placement(cls, config: Config, store: RunDir, policy_round: int) -> WriterPlacement:
        """How actors build this writer, for the texts of policy `policy_round`. Runs in the driver.

        Raises:
            UserError: the source cannot be used as the recipe says.
        """
        return WriterPlacement(cls)

    def users(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Answer]:
        """For each row of the table `users`, as many texts as `counts` says."""
        raise NotImplementedError

    def items(self, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]) -> list[Answer]:
        """The same for rows of the table `items`. Called only if the source writes about items (`describes_items`)."""
        raise NotImplementedError

    def stats(self) -> EngineStats | None:
        """Of the engine; None where there is no engine."""
        return None

    def finished(self) -> int | None:
        """Samples that were written or given up since the start, those of unfinished calls among them. None: not known."""
        return None


@dataclass(frozen=True)
class WriterPlacement:
    """How an actor builds its `TextWriter`, and what the actor occupies.

    Attributes:
        writer: called in the actor with config, store and `arguments`; and with `reason_file` if `dies`.
        num_cpus: None: generate.cpus_per_engine.
        env: environment variables of the actor.
        batch: samples that the writer works on at the same time. 0: the samples of one shard.
        dies: whether the writer may end the actor's process. The reason is then written to `reason_file`.
        prepare: called before the actors start.
        kept: whether engines that outlive the stage have what generate's placement asks for, and not the actors.
    """

    writer: Callable[..., TextWriter]
    arguments: dict[str, Any] = field(default_factory=dict)
    num_gpus: float = 0.0
    num_cpus: float | None = None
    env: dict[str, str] = field(default_factory=lambda: WORKER_ENV)
    batch: int = 0
    dies: bool = False
    prepare: Callable[[], None] | None = None
    kept: bool = False


def catalogue(store: RunDir) -> pa.Table:
    """What prompts and counted texts show of each item: title and attributes, in the order of item ids."""
    return store.read("items", columns=["title", "attributes"])
