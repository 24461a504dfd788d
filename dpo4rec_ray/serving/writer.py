"""Writes texts for users whom no version knows, in the background: vLLM and the text encoder in one process.

The engine has the LLM that wrote the texts of the current version, and gets prompts like those of the run. When another
version is promoted, the writer changes to it. If the running engine can take the new weights (a later policy of the same
LLM), it loads them; else the process ends, and Serve starts one for the new version. For a version without an LLM no texts
are written; the writer then stays with the version before. Jobs for a version that does not answer any more are dropped, and
so are the jobs of a process that ends: replicas submit them again (serving.fresh_retry_s).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence

import pyarrow as pa

from dpo4rec_ray.config.serving import ServingSection
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.catalogue_prompts import TokenizedPrompts
from dpo4rec_ray.knowledge.completions import Answer
from dpo4rec_ray.knowledge.encoder import TextEncoder
from dpo4rec_ray.knowledge.structured import json_factors, read_samples
from dpo4rec_ray.policy.model import load_tokenizer
from dpo4rec_ray.serving.fresh_texts import FreshText, FreshTextStore, TextJob
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.request_metrics import WriterMetrics
from dpo4rec_ray.serving.version_files import table
from dpo4rec_ray.serving.writer_setup import WriterSetup, newest_setup, read_setup
from dpo4rec_ray.storage.local_copies import local_copy
from dpo4rec_ray.texts.engines import KeptEngine

BATCH = 64  # most texts that are written together
SWEEP_S = 300.0  # between two removals of old texts

log = logging.getLogger(__name__)


class JobPrompts:
    """The prompt of a job: the one that the run would have made, without the user's profile."""

    def __init__(self, setup: WriterSetup, items: pa.Table):
        """items: items.arrow of the version."""
        config, tokenizer = setup.config, load_tokenizer(setup.engine.weights.model)
        self._prompts = TokenizedPrompts.of_recipe(config, tokenizer, items, setup.examples)
        self._max_events = config.data.max_history

    def token_ids(self, job: TextJob) -> list[int]:
        """The prompt with the newest events: as many as the run shows, and as fit."""
        newest = slice(-self._max_events, None)
        return self._prompts.user("", job.item_rows[newest], job.ratings[newest])[0]


class Writer:
    """Takes jobs from any thread. A thread of its own writes the texts of all waiting jobs together."""

    def __init__(
        self, registry: Registry, store: FreshTextStore, settings: ServingSection, metrics: WriterMetrics
    ):
        """Loads the LLM and the encoder, which takes seconds to minutes.

        Raises:
            UserError: no version has an LLM, or the encoder cannot be loaded.
        """
        self._registry, self._store, self._settings, self._metrics = registry, store, settings, metrics
        setup = newest_setup(registry, settings)
        self._engine = KeptEngine(setup.engine)
        self._encoder = TextEncoder(setup.config.encoder, "cuda" if settings.writer_gpus else "cpu")
        self._changed = threading.Condition()
        # By version and user id, oldest first: the job, and when it came (time.monotonic).
        self._waiting: dict[tuple[str, str], tuple[TextJob, float]] = {}
        self._in_progress: set[tuple[str, str]] = set()
        self._refused = ""  # why the LLM of the current version was not taken
        metrics.waiting(0)  # else the number of the process before stays
        self._use(setup)
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def offer(self, job: TextJob) -> bool:
        """Whether the job is accepted. A user who waits already gets no second job."""
        key = (job.version, job.user_id)
        with self._changed:
            if key in self._waiting or key in self._in_progress:
                return True
            if job.version != self._setup.version:
                self._metrics.refused("version")
                return False
            if len(self._waiting) >= self._settings.fresh_queue:
                self._metrics.refused("full")
                return False
            self._waiting[key] = (job, time.monotonic())
            self._metrics.waiting(len(self._waiting))
            self._changed.notify()
        return True

    def alive(self) -> bool:
        """Whether the writing thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        swept = -SWEEP_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting, timeout=self._settings.poll_s)
            batch: list[tuple[TextJob, float]] = []
            try:
                self._follow()
                if time.monotonic() - swept > SWEEP_S:
                    swept = time.monotonic()
                    self._sweep()
                with self._changed:
                    keys = list(self._waiting)[:BATCH]
                    batch = [self._waiting.pop(key) for key in keys]
                    self._in_progress = set(keys)
                    self._metrics.waiting(len(self._waiting))
                self._write(batch)
            except Exception:
                log.exception("%d texts could not be written", len(batch))
                self._metrics.failed("error", len(batch))
            with self._changed:
                self._in_progress = set()

    def _sweep(self) -> None:
        """Texts are written all the same where old ones cannot be removed."""
        try:
            self._store.sweep()
        except Exception:
            log.exception("old texts could not be removed")

    def _follow(self) -> None:
        """Change to the current version, if that is another one."""
        try:
            version = self._registry.routing().current
            if version == self._setup.version:
                return
            setup = read_setup(self._registry, version, self._settings)
            if setup.process == self._setup.process:
                self._use(setup)
                return
        except UserError as error:
            if str(error) != self._refused:
                log.warning("texts are still written for version %s: %s", self._setup.version, error)
            self._refused = str(error)
            return
        log.warning("version %s needs another engine: this process ends, Serve starts another", version)
        os._exit(0)

    def _use(self, setup: WriterSetup) -> None:
        prompts = JobPrompts(setup, table(local_copy(self._registry.folder(setup.version) / "items.arrow")))
        with self._changed:
            self._setup, self._prompts = setup, prompts

    def _write(self, batch: Sequence[tuple[TextJob, float]]) -> None:
        setup = self._setup
        todo = []
        for job, since in batch:
            if job.version != setup.version:
                self._metrics.refused("version")
            elif not self._store.read(job.version, job.user_id):  # else another replica's job was written
                todo.append((job, since))
        if not todo:
            return
        answers = self._engine.generate(
            setup.engine.weights,
            [self._prompts.token_ids(job) for job, _ in todo],
            [seed_of(setup.config.run.seed, "fresh", job.user_id) for job, _ in todo],
            [1] * len(todo),
        )
        texts = [self._text(answer) for answer in answers]
        good = [(*one, text) for one, text in zip(todo, texts, strict=True) if text]
        vectors = self._encoder.encode([text for *_, text in good])
        for (job, since, text), vector in zip(good, vectors, strict=True):
            fresh = FreshText(text, vector)
            self._store.write(job.version, job.user_id, fresh, setup.config.encoder.path)
            self._metrics.written(time.monotonic() - since)

    def _text(self, answer: Answer) -> str:
        """The text to encode; "" if there is none, which is counted as a failure."""
        config = self._setup.config
        samples, _ = read_samples(answer.samples, json_factors(config.prompt, config.generate))
        if samples and samples[0].text.strip():
            return samples[0].text
        self._metrics.failed(answer.reason or "empty_text")
        return ""
