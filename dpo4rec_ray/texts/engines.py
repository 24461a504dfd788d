"""Engines that outlive a stage (`generate.keep_engines`): actors of the driver that sampling actors call.

The same plain class as ever runs in them. A stage that serves other weights says so with each call, so that a warm engine
changes policy in place, and one that was restarted after a crash finds the right one by itself.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo4rec_ray.config import Config
from dpo4rec_ray.knowledge.generator import (
    Answer,
    EngineDied,
    EngineSettings,
    EngineStats,
    Sampling,
    VLLMGenerator,
)
from dpo4rec_ray.knowledge.watchdog import Watchdog
from dpo4rec_ray.workers.placement import KEPT, check_room, engine_env

CALLS_AT_ONCE = 32  # threads of an engine's actor: calls under way, claims and figures
MAX_RESTARTS = 50  # of one engine in a run

_kept: dict[str, tuple[Any, list[Any]]] = {}  # run folder -> what its engines are, and their actors


class KeptEngine:
    """One engine with its watchdog, as an actor of the driver."""

    def __init__(self, engine: EngineSettings, sampling: Sampling, stall_timeout_s: float):
        watchdog = Watchdog(stall_timeout_s)
        self._generator = VLLMGenerator(engine, sampling, alive=watchdog.alive, idle=watchdog.idle)
        self._owner, self._lock = "", threading.Lock()

    def begin_stage(self) -> None:
        """Nobody's, and with new figures."""
        self._owner = ""
        self._generator.count_anew()

    def claim(self, owner: str) -> bool:
        """Whether this engine is the owner's now; the same owner may ask again."""
        with self._lock:
            self._owner = self._owner or owner
            return self._owner == owner

    def max_prompt(self) -> int:
        return self._generator.max_prompt

    def generate(
        self,
        serving: tuple[str, str | None],
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        num_samples: Sequence[int],
    ) -> list[Answer]:
        """As `VLLMGenerator.generate`, by the weights (model, adapter)."""
        try:
            self._generator.use(*serving)
            return self._generator.generate(prompts, seeds, num_samples)
        except EngineDied:
            os._exit(1)  # Ray starts it again; a dead engine in a living process would be asked for ever

    def stats(self) -> EngineStats:
        return self._generator.stats()


class KeptGenerator:
    """A sampling actor's own `KeptEngine`; called like a `VLLMGenerator`."""

    def __init__(self, engines: Sequence[Any], serving: tuple[str, str | None], owner: str):
        """owner: stays the same when the sampling actor is restarted.

        Raises:
            RuntimeError: more owners than engines.
        """
        import ray

        mine = [engine for engine in engines if ray.get(engine.claim.remote(owner))][:1]
        if not mine:
            raise RuntimeError(f"none of {len(engines)} engines is free for {owner}")
        (self._engine,) = mine
        self.max_prompt: int = ray.get(self._engine.max_prompt.remote())
        self._serving, self._last = serving, EngineStats()

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], num_samples: Sequence[int]
    ) -> list[Answer]:
        import ray
        import ray.exceptions

        # Other calls wait for an engine that is being restarted; this one must not be repeated unseen: its prompts may
        # be what ended the engine, and who called knows how to find out.
        generate = self._engine.generate.options(max_task_retries=0)
        try:
            return ray.get(generate.remote(self._serving, prompts, seeds, num_samples))
        except ray.exceptions.RayActorError as error:
            raise EngineDied(f"the engine's process ended: {str(error).splitlines()[0]}") from None

    def stats(self) -> EngineStats:
        import ray
        import ray.exceptions

        with contextlib.suppress(ray.exceptions.RayActorError):
            self._last = ray.get(self._engine.stats.options(max_task_retries=0).remote())
        return self._last


def kept_engines(config: Config, engine: EngineSettings, sampling: Sampling, folder: Path) -> list[Any]:
    """The run's engines, started where there are none yet; nobody's at first."""
    import ray

    section = config.generate
    base = replace(engine, adapter=None)
    # Merged policies have the base's shape; an engine that is to take LoRA later has to be made for it.
    same = (replace(base, model=""), sampling, section.num_engines)
    known, actors = _kept.get(str(folder), (None, []))
    if known != same:
        release_engines()
        actor = ray.remote(KeptEngine).options(
            num_cpus=section.cpus_per_engine,
            num_gpus=section.gpus_per_engine,
            max_restarts=MAX_RESTARTS,
            max_task_retries=-1,
            max_concurrency=CALLS_AT_ONCE,
            runtime_env={"env_vars": engine_env(config)},
        )
        check_room(
            f"{section.num_engines} engines",
            section.num_engines * section.cpus_per_engine,
            section.num_engines * section.gpus_per_engine,
        )
        actors = [actor.remote(base, sampling, section.stall_timeout_s) for _ in range(section.num_engines)]
        _kept[str(folder)] = (same, actors)
        KEPT.update(
            CPU=section.num_engines * section.cpus_per_engine,
            GPU=section.num_engines * section.gpus_per_engine,
        )
    ray.get([one.begin_stage.remote() for one in actors])  # waits until they are ready
    return actors


def release_engines() -> None:
    """End them all and give back what they occupy."""
    import ray

    for _, actors in _kept.values():
        for actor in actors:
            ray.kill(actor)
    _kept.clear()
    KEPT.clear()
