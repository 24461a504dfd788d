"""Writes texts for users whom no version knows, in the background: vLLM and the text encoder in one Serve replica.

The engine has the weights that wrote the current version's texts, and asks as the encode stage asks. When another version
is promoted the writer goes over to it: new weights are read into the running engine where that can take them (another
round's policy of the same LLM); else the process ends and Serve starts one for the new version. A version that has no LLM
(publish says which do) is not written for; the writer then stays with the one before. What waits for a version that does
not answer any more, or in a process that ends, is lost: replicas ask again (serving.fresh_retry_s).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo4rec_ray.config import Config, read_config
from dpo4rec_ray.config.serving import ServingSection
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.catalogue_prompts import TokenizedPrompts
from dpo4rec_ray.knowledge.completions import Answer
from dpo4rec_ray.knowledge.encoder import TextEncoder
from dpo4rec_ray.knowledge.engine_spec import LOAD_FORMATS, OWN_ARGUMENTS, EngineSpec, ServedWeights
from dpo4rec_ray.knowledge.structured import json_factors, read_samples
from dpo4rec_ray.policy.model import load_tokenizer
from dpo4rec_ray.serving.figures import FreshFigures
from dpo4rec_ray.serving.fresh import FreshStore, Order
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.service import Written
from dpo4rec_ray.serving.version_files import WRITER_ADAPTER, WRITER_FOLDER, WRITER_LLM, table
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.policies import base_llm_path
from dpo4rec_ray.texts.engines import KeptEngine
from dpo4rec_ray.texts.policy_texts import engine_spec

BATCH = 64  # texts that are written together
SWEEP_S = 300.0  # between looks for texts that are too old
GPU_MEMORY = 0.9  # of the writer's part of a GPU

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How a version's texts are written: the run's settings, and the engine with the version's weights."""

    version: str
    config: Config
    engine: EngineSpec

    @property
    def process(self) -> tuple[Any, ...]:
        """What a running process cannot change; versions that agree in it take turns in one."""
        file = Path(self.engine.weights.model) / "config.json"
        shape = file.read_text(encoding="utf-8") if file.is_file() else self.engine.weights.model
        return shape, self.engine.fixed, self.config.encoder


def plan_of(registry: Registry, version: str, settings: ServingSection) -> Plan:
    """Raises UserError: the version has no LLM, or one that cannot run on what `settings` give the writer."""
    folder = registry.folder(version) / WRITER_FOLDER
    if not folder.is_dir():
        raise UserError(
            f'serving.online_llm = "async": version {version} has no texts written under vLLM (llm.source = "vllm"), so '
            'nobody could write more; promote one that has, or set serving.online_llm = "off"'
        )
    gpus = settings.writer_gpus
    placed = {"gpus_per_engine": gpus, "cpus_per_engine": settings.writer_cpus, "keep_engines": "false"}
    placed |= {"gpu_memory_utilization": GPU_MEMORY * min(1.0, gpus or 1.0)}
    if not gpus:
        placed |= {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    config = read_config(folder, [f"generate.{key}={value}" for key, value in placed.items()])
    section = config.generate
    processes = section.tensor_parallel_size * section.pipeline_parallel_size
    if processes > 1 and gpus != processes:
        raise UserError(f"serving.writer_gpus = {gpus:g}, but the LLM of version {version} takes {processes}")
    extra = section.engine_args
    if extra.keys() & OWN_ARGUMENTS or extra.get("load_format", LOAD_FORMATS[0]) not in LOAD_FORMATS:
        raise UserError(f"{folder}: engine_args {extra} are refused; publish the run again")
    llm, adapter = folder / WRITER_LLM, folder / WRITER_ADAPTER
    weights = ServedWeights(
        str(llm) if llm.is_dir() else base_llm_path(config, RunDir(folder)),
        str(adapter) if adapter.is_dir() else None,
    )
    return Plan(version, config, engine_spec(config, weights))


def newest_plan(registry: Registry, settings: ServingSection) -> Plan:
    """Of the current version; where that has no LLM, of the newest before it that has.

    Raises:
        UserError: there is none; it says what is wrong with the current version.
    """
    traffic = registry.traffic()
    mistakes = []
    for version in (traffic.current, *reversed(traffic.previous)):
        try:
            return plan_of(registry, version, settings)
        except UserError as error:
            mistakes.append(error)
    raise mistakes[0]


class Prompts:
    """What the LLM is asked about the user of an order: what the run would have asked, but for the profile."""

    def __init__(self, plan: Plan, items: pa.Table):
        """items: of the version (published.ITEMS)."""
        config, tokenizer = plan.config, load_tokenizer(plan.engine.weights.model)
        self._prompts = TokenizedPrompts(tokenizer, items, config.llm, config.prompt, config.generate)
        self._max_events = config.data.max_history

    def token_ids(self, order: Order) -> list[int]:
        """With the newest events, as many as the run would have shown and as fit."""
        items, ratings = order.item_rows[-self._max_events :], order.ratings[-self._max_events :]
        return self._prompts.user("", items, ratings)[0]


class Writer:
    """Takes orders from any thread and writes the texts in one of its own, all that wait at once."""

    def __init__(
        self, registry: Registry, store: FreshStore, settings: ServingSection, figures: FreshFigures
    ):
        """Loads the LLM: seconds to minutes.

        Raises:
            UserError: no version has an LLM, or the encoder cannot be loaded.
        """
        self._registry, self._store, self._settings, self._figures = registry, store, settings, figures
        plan = newest_plan(registry, settings)
        self._engine = KeptEngine(plan.engine)
        self._encoder = TextEncoder(plan.config.encoder, "cuda" if settings.writer_gpus else "cpu")
        self._changed = threading.Condition()
        self._waiting: dict[tuple[str, str], tuple[Order, float]] = {}  # order and its time, oldest first
        self._at_work: set[tuple[str, str]] = set()
        self._refused = ""  # why the present version's LLM was not taken over
        self._begin(plan)
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def offer(self, order: Order) -> bool:
        """Whether the text will be written, as far as can be said; a user whose text is under way is not taken twice."""
        key = (order.version, order.user_id)
        with self._changed:
            if key in self._waiting or key in self._at_work:
                return True
            if order.version != self._plan.version:
                self._figures.refused("version")
                return False
            if len(self._waiting) >= self._settings.fresh_queue:
                self._figures.refused("full")
                return False
            self._waiting[key] = (order, time.monotonic())
            self._figures.waiting(len(self._waiting))
            self._changed.notify()
        return True

    def alive(self) -> bool:
        """Whether texts are still being written."""
        return self._thread.is_alive()

    def _run(self) -> None:
        swept = -SWEEP_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting, timeout=self._settings.poll_s)
            batch: list[tuple[Order, float]] = []
            try:
                self._follow()
                if time.monotonic() - swept > SWEEP_S:
                    swept = time.monotonic()
                    self._store.sweep()
                with self._changed:
                    keys = list(self._waiting)[:BATCH]
                    batch = [self._waiting.pop(key) for key in keys]
                    self._at_work = set(keys)
                    self._figures.waiting(len(self._waiting))
                self._write(batch)
            except Exception:
                log.exception("%d texts could not be written", len(batch))
                self._figures.failed("error", len(batch))
            with self._changed:
                self._at_work = set()

    def _follow(self) -> None:
        """Go over to the version that answers now, if it is another one."""
        try:
            version = self._registry.traffic().current
            if version == self._plan.version:
                return
            plan = plan_of(self._registry, version, self._settings)
            if plan.process == self._plan.process:
                self._begin(plan)
                return
        except UserError as error:
            if str(error) != self._refused:
                log.warning("texts are still written for version %s: %s", self._plan.version, error)
            self._refused = str(error)
            return
        log.warning("version %s needs another engine: Serve starts one", version)
        os._exit(0)

    def _begin(self, plan: Plan) -> None:
        prompts = Prompts(plan, table(self._registry.folder(plan.version) / "items.arrow"))
        with self._changed:
            self._plan, self._prompts = plan, prompts

    def _write(self, batch: Sequence[tuple[Order, float]]) -> None:
        plan = self._plan
        todo = []
        for order, since in batch:
            if order.version != plan.version:
                self._figures.refused("version")
            elif not self._store.read(order.version, order.user_id):  # else another replica ordered it too
                todo.append((order, since))
        if not todo:
            return
        answers = self._engine.generate(
            plan.engine.weights,
            [self._prompts.token_ids(order) for order, _ in todo],
            [seed_of(plan.config.run.seed, "fresh", order.user_id) for order, _ in todo],
            [1] * len(todo),
        )
        texts = [self._text(answer) for answer in answers]
        good = [(*one, text) for one, text in zip(todo, texts, strict=True) if text]
        vectors = self._encoder.encode([text for *_, text in good])
        for (order, since, text), vector in zip(good, vectors, strict=True):
            self._store.write(order.version, order.user_id, Written(text, vector), plan.config.encoder.path)
            self._figures.written(time.monotonic() - since)

    def _text(self, answer: Answer) -> str:
        """What is encoded; "" where there is nothing to encode, which is counted."""
        config = self._plan.config
        samples, _ = read_samples(answer.samples, json_factors(config.prompt, config.generate))
        if samples and samples[0].text.strip():
            return samples[0].text
        self._figures.failed(answer.reason or "empty_text")
        return ""
