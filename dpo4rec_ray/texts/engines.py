"""Engines that outlive a stage (`generate.keep_engines`): actors of the driver, which sampling actors call.

Each call says which weights it wants. So an engine takes over another round's policy without a new start, and an engine
that was restarted after a crash loads the right weights by itself.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo4rec_ray.config import Config
from dpo4rec_ray.errors import first_line
from dpo4rec_ray.knowledge.completions import Answer
from dpo4rec_ray.knowledge.engine_loop import EngineDied, EngineStats
from dpo4rec_ray.knowledge.engine_spec import EngineSpec, ServedWeights
from dpo4rec_ray.knowledge.generator import VLLMGenerator
from dpo4rec_ray.knowledge.watchdog import Watchdog
from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.workers.needs import Groups
from dpo4rec_ray.workers.node_disk import full_disk_named
from dpo4rec_ray.workers.phases import READY, phase
from dpo4rec_ray.workers.placement import check_room, engine_env, release_room, reserve_room, without_sklearn
from dpo4rec_ray.workers.stage_workers import engines

CALLS_AT_ONCE = 32  # threads of an engine's actor: running calls, claims and stats
MAX_RESTARTS = 50  # of one engine in a run

# Run folder -> what its engines cannot change, and their actors.
_running: dict[str, tuple[Any, list[Any]]] = {}
_groups = Groups()  # of those whose GPUs are on several nodes


def start_engine(spec: EngineSpec, reason_file: Place | None = None) -> VLLMGenerator:
    """An engine in this process with a watchdog beside it, which writes into `reason_file` why it ends the process.

    Raises:
        UserError: it does not start, and this node's disk is full.
    """
    watchdog = Watchdog(spec.generate.stall_timeout_s, reason_file)
    without_sklearn()
    phase("importing vLLM")
    # vLLM writes what it learns of an architecture into a temporary file.
    with full_disk_named("start an engine"):
        import vllm  # noqa: F401

        phase(f"loading {Path(spec.weights.model).name}")
        return VLLMGenerator(spec, alive=watchdog.alive, idle=watchdog.idle)


class KeptEngine:
    """One engine with its watchdog, as an actor of the driver. The engine starts with the first call that needs it."""

    def __init__(self, spec: EngineSpec):
        self._spec, self._owner = spec, ""
        self._lock, self._starting = threading.Lock(), threading.Lock()

    @cached_property
    def _generator(self) -> VLLMGenerator:
        generator = start_engine(self._spec)
        phase(READY)
        return generator

    @property
    def _engine(self) -> VLLMGenerator:
        with self._starting:
            return self._generator

    def start(self) -> None:
        """Start the engine if it does not run."""
        _ = self._engine

    def begin_stage(self) -> None:
        """Forget the last stage's owner and stats."""
        self._owner = ""
        self._engine.reset_stats()

    def claim(self, owner: str) -> bool:
        """Whether this engine is the owner's now; the same owner may ask again."""
        with self._lock:
            self._owner = self._owner or owner
            return self._owner == owner

    def owner(self) -> str:
        """Whose it is; "" of nobody's, as after a restart."""
        return self._owner

    def generate(
        self,
        weights: ServedWeights,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        num_samples: Sequence[int],
    ) -> list[Answer]:
        """As `VLLMGenerator.generate`, with these weights."""
        try:
            self._engine.use(*weights)
            return self._engine.generate(prompts, seeds, num_samples)
        except EngineDied:
            os._exit(
                1
            )  # Ray starts the process again; a dead engine in a living process would fail every call

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def finished(self) -> int:
        return self._engine.finished()


class KeptGenerator:
    """A sampling actor's own `KeptEngine`; called like a `VLLMGenerator`."""

    def __init__(self, engines: Sequence[Any], weights: ServedWeights, owner: str):
        """engines: actors of `KeptEngine`; owner: a name that stays the same when the sampling actor is restarted.

        Raises:
            RuntimeError: more owners than engines.
        """
        import ray

        self._engine = _own_engine(engines, owner)
        if self._engine is None:
            # Only the first that is free: whoever claims them all leaves none for the other actors.
            self._engine = next((engine for engine in engines if ray.get(engine.claim.remote(owner))), None)
        if self._engine is None:
            raise RuntimeError(f"none of {len(engines)} engines is free for {owner}")
        self._weights, self._last, self._finished = weights, EngineStats(), 0

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], num_samples: Sequence[int]
    ) -> list[Answer]:
        """Raises EngineDied: the engine's process ended during this call."""
        import ray
        import ray.exceptions

        # Ray repeats other calls until a restarted engine answers. This call must not be repeated without the caller's
        # knowledge: its prompts may be what ended the engine, and the caller finds out which (texts/attempts.py).
        generate = self._engine.generate.options(max_task_retries=0)
        try:
            return ray.get(generate.remote(self._weights, prompts, seeds, num_samples))
        except ray.exceptions.RayActorError as error:
            raise EngineDied(f"the engine's process ended: {first_line(error)}") from None

    def stats(self) -> EngineStats:
        """Of the engine since the stage began; the last known ones if the engine does not answer."""
        import ray
        import ray.exceptions

        with contextlib.suppress(ray.exceptions.RayActorError):
            self._last = ray.get(self._engine.stats.options(max_task_retries=0).remote())
        return self._last

    def finished(self) -> int:
        """As `VLLMGenerator.finished`; the last known number if the engine does not answer."""
        import ray
        import ray.exceptions

        with contextlib.suppress(ray.exceptions.RayActorError):
            self._finished = ray.get(self._engine.finished.options(max_task_retries=0).remote())
        return self._finished


def _own_engine(engines: Sequence[Any], owner: str) -> Any:
    """The engine that the owner already has. The others are waited for only where it has none: they may be starting anew."""
    import ray

    waiting = {engine.owner.remote(): engine for engine in engines}
    while waiting:
        (answered,), _ = ray.wait(list(waiting))
        engine = waiting.pop(answered)
        if ray.get(answered) == owner:
            return engine
    return None


def kept_engines(config: Config, spec: EngineSpec, folder: Place) -> list[Any]:
    """Actors of the run's engines. They are started if there are none, or none that can serve `spec`; call `begin_stage` next.

    Raises:
        UserError: they can never be placed.
    """
    import ray

    section = spec.generate
    wanted = (spec.fixed, section.num_engines)
    known, actors = _running.get(str(folder), (None, []))
    if known != wanted:
        release_engines()
        # An idle engine holds a GPU, but no CPU: on CPUs the sampling actors hold them while an engine works. Ray places an
        # actor that asks for nothing where a CPU is free, and counts none once it is there; one that asks for num_gpus=0, or
        # for anything else, it gives a CPU for good.
        workers = engines(config)
        where = {"scheduling_strategy": "SPREAD"} | workers.needs.options()
        if not section.gpus_per_engine:
            del where["num_cpus"], where["num_gpus"]
            if "resources" in where or "memory" in where:
                where["num_cpus"] = 0
        actor = ray.remote(KeptEngine).options(
            **where,
            max_restarts=MAX_RESTARTS,
            max_task_retries=-1,
            max_concurrency=CALLS_AT_ONCE,
            runtime_env={"env_vars": engine_env(config)},
        )
        check_room(workers)
        base = replace(spec, weights=ServedWeights(spec.weights.model))
        apart = _groups.option(workers.needs)
        actors = [
            (actor.options(**apart()) if apart else actor).remote(base) for _ in range(section.num_engines)
        ]
        for one in actors:
            one.start.remote()  # nobody waits for it yet
        _running[str(folder)] = (wanted, actors)
        if section.gpus_per_engine:
            reserve_room(workers)
    return actors


def begin_stage(engines: Sequence[Any]) -> None:
    """Wait until these engines are ready, and leave them without an owner."""
    import ray

    progress = Progress("engines", len(engines), "engines")
    progress.starting = lambda: "vLLM is imported and the model loaded"
    with progress:
        ray.get([engine.begin_stage.remote() for engine in engines])


def release_engines() -> None:
    """End all engines and give back the CPUs and GPUs that they hold."""
    import ray

    for _, actors in _running.values():
        for actor in actors:
            ray.kill(actor)
    _running.clear()
    _groups.close()
    release_room()
