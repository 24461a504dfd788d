"""Writes the texts of one shard inside an actor: retries after engines died, reasons for missing texts, and counts.

When an engine dies its process ends. Ray starts a new actor and gives it the same shards; `attempts` then finds out
whether one prompt is the cause.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, replace

import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.knowledge.completions import Answer
from dpo4rec_ray.knowledge.shared_lock import SharedLock
from dpo4rec_ray.knowledge.structured import json_factors, read_samples
from dpo4rec_ray.storage.places import place
from dpo4rec_ray.store.artifacts import RunDir, part_file, write_part
from dpo4rec_ray.texts.attempts import Attempt, Start, reason_file
from dpo4rec_ray.texts.filling import Filling
from dpo4rec_ray.texts.text_source import Row, WriterPlacement
from dpo4rec_ray.workers.phases import FIRST_WORK, phase
from dpo4rec_ray.workers.run_metrics import Metrics

# Samples that a writer has in hand, for each that it works on at the same time: the next shard is read while these last.
AHEAD = 1.25


@dataclass(frozen=True)
class WritingJob:
    """What all actors of a pool have in common.

    Attributes:
        round_id: of the artifact that is written.
        folder: of that artifact.
        stage: that writes it.
        samples_per_shard: about how many.
        seed: of this stage and policy; each user's seed is drawn from it.
        start_id: changes with every start of the driver.
    """

    config: Config
    store: RunDir
    placement: WriterPlacement
    round_id: int
    folder: str
    stage: str
    samples_per_shard: int
    seed: int
    start_id: str


@dataclass(frozen=True)
class ShardTexts:
    """The users (or items) of a shard, how many texts each should get, and what was written.

    Attributes:
        answers: in the order of `ids`, with a reason for everyone who lacks texts.
        totals: the shard's counts (throughput.COUNTS).
    """

    ids: list[int]
    counts: list[int]
    answers: list[Answer]
    totals: dict[str, int]


class ShardWriter:
    """Owns the source's writer. Safe to call from many threads, one shard each."""

    def __init__(self, job: WritingJob, subject: str = "user"):
        """subject: "user" or "item".

        Raises:
            UserError: too many engines ended while they started, or the source cannot be opened.
        """
        self._job, self._subject = job, subject
        self._factors = json_factors(job.config.prompt, job.config.generate)
        self._engine = f"{socket.gethostname()}-{os.getpid()}"
        self._lock = SharedLock()
        placement, arguments = job.placement, dict(job.placement.arguments)
        if placement.dies:
            start = Start(job.folder, job.start_id, self._engine, job.config.generate.num_engines)
            arguments["reason_file"] = reason_file(job.folder, self._engine)
            self._writer = placement.writer(job.config, job.store, **arguments)
            start.done()
        else:
            self._writer = placement.writer(job.config, job.store, **arguments)
        self._filling = Filling(self._writer.finished)
        self._asked: set[int] = set()  # shards whose samples are in `filling`, or have been
        self._metrics = Metrics(job.config.run.name, job.stage, job.round_id, engine=self._engine)
        phase(FIRST_WORK)

    def write(
        self, shard: int, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]
    ) -> ShardTexts:
        """Texts about these rows of `users` or `items`. Those that got none are committed to the folder `failed`."""
        ids = [row[f"{self._subject}_id"] for row in rows]
        found = self._answers(shard, ids, rows, seeds, counts)
        totals: Counter[str] = Counter(users=len(ids))
        answers = [self._checked(one, count, totals) for one, count in zip(found, counts, strict=True)]
        for name in ("users", "samples", "tokens", "failed"):
            self._metrics.count(f"dpo4rec_{name}", totals[name])
        self._write_failed(shard, ids, answers)
        return ShardTexts(ids, list(counts), answers, dict(totals))

    def engine_row(self) -> Row:
        """The engine's stats for the driver (`Throughput.add`)."""
        stats = self._writer.stats()
        if stats is None:
            return {"engine": ""}
        for name in ("busy", "running", "kv_cache"):
            self._metrics.level(f"dpo4rec_engine_{name}", getattr(stats, name))
        row = asdict(stats)
        # A shard's own counts are named "tokens" and "samples".
        row |= {f"engine_{name}": row.pop(name) for name in ("tokens", "samples")}
        return {**row, "engine": self._engine}

    def has_room(self, shards: Set[int]) -> bool:
        """Whether the writer needs another shard to stay busy. shards: those that it has been given and that are not done."""
        if not self._job.placement.batch:
            return True
        waiting = len(shards - self._asked)  # their users are being read
        self._asked &= shards
        samples = self._filling.unfinished() + waiting * self._job.samples_per_shard
        return samples < AHEAD * self._job.placement.batch

    def users_inside(self) -> int:
        """Users (or items) that are done in shards that are not."""
        return self._filling.users_done()

    def _answers(
        self,
        shard: int,
        ids: Sequence[int],
        rows: Sequence[Row],
        seeds: Sequence[int],
        counts: Sequence[int],
    ) -> list[Answer]:
        """The texts of all at once. If engines died at this shard while it was alone, of one after the other."""
        if not self._job.placement.dies:
            return self._ask(shard, rows, seeds, counts)
        attempt = Attempt.begin(self._job.folder, shard, self._job.start_id, self._engine)
        if attempt.one_by_one:
            found = []
            for subject_id, row, seed, count in zip(ids, rows, seeds, counts, strict=True):
                if attempt.is_poison(subject_id):
                    found.append(Answer([], "engine_died", attempt.reason or "its engine died twice"))
                    continue
                with self._lock.alone():  # so that a death can have no other cause
                    attempt.enter(subject_id)
                    found += self._ask(shard, [row], [seed], [count])
                    attempt.leave()
        else:
            with self._lock.alone() if attempt.deaths else self._lock.shared():
                attempt.enter()
                found = self._ask(shard, rows, seeds, counts)
        attempt.end()
        return found

    def _ask(
        self, shard: int, rows: Sequence[Row], seeds: Sequence[int], counts: Sequence[int]
    ) -> list[Answer]:
        write = self._writer.users if self._subject == "user" else self._writer.items
        with self._filling.shard(len(rows), sum(counts)):
            self._asked.add(shard)
            return write(rows, seeds, counts)

    def _checked(self, one: Answer, count: int, totals: Counter[str]) -> Answer:
        """The same with sentences in place of JSON, and with a reason if texts are missing; counted in `totals`."""
        reason = one.reason or failure(one, count)
        samples, invalid = read_samples(one.samples, self._factors)
        if self._factors is not None:
            totals["invalid_json"] += invalid
        totals["prompt_tokens"] += len(one.prompt_token_ids)
        totals["shortened"] += one.num_left_out > 0
        totals["failed"] += bool(reason)
        totals["samples"] += len(samples)
        totals["tokens"] += sum(len(sample.token_ids) for sample in samples)
        totals.update(one.usage)
        totals["clipped"] += sum(sample.finish_reason == "length" for sample in samples)
        return replace(one, samples=samples, reason=reason)

    def _write_failed(self, shard: int, ids: Sequence[int], answers: Sequence[Answer]) -> None:
        """Commit who has no texts, before the shard's own part: that part says that the whole shard is accounted for."""
        failed = [(subject_id, one) for subject_id, one in zip(ids, answers, strict=True) if one.reason]
        folder = place(self._job.folder) / "failed"
        if not failed:
            # An earlier try may have been killed between its two parts.
            part_file(folder, shard).unlink(missing_ok=True)
            return
        folder.mkdir(exist_ok=True)
        table = {
            "round": [self._job.round_id] * len(failed),
            "subject": [self._subject] * len(failed),
            "subject_id": [subject_id for subject_id, _ in failed],
            "reason": [one.reason for _, one in failed],
            "detail": [one.detail for _, one in failed],
        }
        write_part(folder, "failed", pa.table(table), shard)


def failure(answer: Answer, count: int) -> str:
    """Why these samples cannot be used; empty if they can."""
    if len(answer.samples) != count:
        return "missing_samples"
    return "empty_text" if any(not sample.text.strip() for sample in answer.samples) else ""
