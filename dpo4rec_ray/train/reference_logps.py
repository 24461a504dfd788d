"""The reference's log-probabilities of a round's texts, by a pool of actors, stored beside the artifact that the texts are in.

The folder's name is a hash of the reference and of everything that shapes the numbers. A run that is repeated with the same
reference finds them there, whatever else in the recipe has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.training import PolicySection
from dpo4rec_ray.policy.reference_scorer import ReferenceScorer
from dpo4rec_ray.storage.parquet import read_folder
from dpo4rec_ray.storage.places import Place, place
from dpo4rec_ray.store.artifacts import RunDir, fingerprint_of, part_file, part_notes, write_part
from dpo4rec_ray.store.policies import model_identity
from dpo4rec_ray.store.progress import Progress, say
from dpo4rec_ray.train.policy_task import TextSource
from dpo4rec_ray.workers.phases import FIRST_WORK, phase
from dpo4rec_ray.workers.placement import without_sklearn
from dpo4rec_ray.workers.shards import Pool, Row, part_number, resume_parts, run_shards


class StoredPolicy(NamedTuple):
    """A policy whose log-probabilities are stored: folder or hub name of a model, and a LoRA on it."""

    model: str
    lora: str | None = None


def cached_reference(
    config: Config,
    store: RunDir,
    round_id: int,
    policies: Sequence[StoredPolicy],
    source: TextSource,
    temperature: float,
) -> list[Place]:
    """Compute what is missing, of a model and a LoRA on it by the same workers.

    Returns:
        Each policy's folder, with one part per part of the source's artifacts.
    """
    section = config.policy
    manifests = [store.require(name, round_id) for name in source.artifacts]
    made = [part for one in manifests for part in (one.fingerprint, one.produced)]
    files: dict[int, list[Place]] = {}
    for name in source.artifacts:
        for file in store.files(name, round_id):
            files.setdefault(part_number(file), []).append(file)

    def opened(policy: StoredPolicy) -> tuple[Place, set[int]]:
        """The policy's folder and the parts that are there."""
        more = [str(temperature)] if temperature != 1 else []
        more += [model_identity(policy.lora)] if policy.lora else []
        model = model_identity(policy.model)
        fingerprint = fingerprint_of(model, config.llm.dtype, section.quantize, *made, *more)
        folder = store.path(source.artifacts[0], round_id) / "reference" / fingerprint
        return folder, resume_parts(folder, fingerprint)

    found = {policy: opened(policy) for policy in policies}
    for model in dict.fromkeys(policy.model for policy in policies):
        own = {policy.lora: found[policy] for policy in policies if policy.model == model}
        done = set[int].intersection(*(parts for _, parts in own.values()))
        shards = [(part, 0, 0) for part in sorted(set(files) - done)]
        if not shards:
            continue
        pool = Pool(
            ShardReference,
            {
                "files": files,
                "folders": {lora: str(folder) for lora, (folder, _) in own.items()},
                "model": model,
                "dtype": config.llm.dtype,
                "section": section,
                "source": source,
                "temperature": temperature,
            },
            section.num_workers,
            section.cpus_per_worker,
            num_gpus=section.gpus_per_worker,
            where=section,
            what=f"workers of {section.objective_of(round_id)}",
        )
        folder = next(folder for folder, _ in own.values())
        already = sum(part_notes(part_file(folder, part))[0] for part in done)
        if already:
            say(f"  reference: {already} {source.unit} kept from an interrupted run")
        progress = Progress("reference", source.total(manifests), source.unit, already=already)
        for _ in run_shards(shards, [pool], progress, already=already):
            pass
    return [found[policy][0] for policy in policies]


def read_reference(folder: str | Path) -> pa.Table:
    """All parts, in their order."""
    return read_folder(place(folder), "part-*.parquet")


class ShardReference:
    """Scores the texts of one part and writes their log-probabilities as one part, of each policy."""

    def __init__(
        self,
        files: dict[int, list[Place]],
        folders: dict[str | None, str],
        model: str,
        dtype: str,
        section: PolicySection,
        source: TextSource,
        temperature: float,
    ):
        """folders: where the log-probabilities go of the model (None), and of a LoRA on it, one at most."""
        self._files, self._folders, self._source = files, folders, source
        without_sklearn()
        phase(f"loading {Path(model).name}")
        lora = next(filter(None, folders), None)
        self._scorer = ReferenceScorer(
            model, dtype, section, per_token=source.per_token, temperature=temperature, lora=lora
        )
        phase(FIRST_WORK)

    def __call__(self, row: Row) -> Row:
        part = int(row["shard"])
        users, groups = self._source.read(self._files[part])
        for lora, folder in self._folders.items():
            if not part_file(folder, part).exists():  # an interrupted run may have come to one of them
                logps = self._scorer(groups, lora=lora is not None)
                write_part(folder, self._source.schema, self._source.table(users, logps), part)
        return {"shard": part, "users": len(users)}
