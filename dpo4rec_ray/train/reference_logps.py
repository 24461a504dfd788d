"""The reference's log-probabilities of a round's texts, by a pool of actors, stored beside the artifact that the texts are in.

The folder's name is a hash of the reference and of everything that shapes the numbers. A run that is repeated with the same
reference finds them there, whatever else in the recipe has changed.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.training import PolicySection
from dpo4rec_ray.policy.reference_scorer import ReferenceScorer
from dpo4rec_ray.storage.parquet import read_folder
from dpo4rec_ray.storage.places import Place, place
from dpo4rec_ray.store.artifacts import RunDir, fingerprint_of, write_part
from dpo4rec_ray.store.policies import model_identity
from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.train.policy_task import TextSource
from dpo4rec_ray.workers.phases import FIRST_WORK, phase
from dpo4rec_ray.workers.placement import without_sklearn
from dpo4rec_ray.workers.shards import Pool, Row, part_number, resume_parts, run_shards


def cached_reference(
    config: Config,
    store: RunDir,
    round_id: int,
    model: str,
    source: TextSource,
    temperature: float,
    lora: str | None = None,
) -> Place:
    """Compute what is missing. Returns the folder, with one part per part of the source's artifacts. lora: on the model."""
    section = config.policy
    manifests = [store.require(name, round_id) for name in source.artifacts]
    made = [part for one in manifests for part in (one.fingerprint, one.produced)]
    more = [str(temperature)] if temperature != 1 else []
    more += [model_identity(lora)] if lora else []
    fingerprint = fingerprint_of(model_identity(model), config.llm.dtype, section.quantize, *made, *more)
    folder = store.path(source.artifacts[0], round_id) / "reference" / fingerprint
    files: dict[int, list[Place]] = {}
    for name in source.artifacts:
        for file in store.files(name, round_id):
            files.setdefault(part_number(file), []).append(file)
    done = resume_parts(folder, fingerprint)
    pool = Pool(
        ShardReference,
        {
            "files": files,
            "folder": str(folder),
            "model": model,
            "dtype": config.llm.dtype,
            "section": section,
            "source": source,
            "temperature": temperature,
            "lora": lora,
        },
        section.num_workers,
        section.cpus_per_worker,
        num_gpus=section.gpus_per_worker,
        where=section,
        what=f"workers of {section.objective_of(round_id)}",
    )
    shards = [(part, 0, 0) for part in sorted(set(files) - done)]
    progress = Progress("reference", source.total(manifests), source.unit)
    for _ in run_shards(shards, [pool], progress):
        pass
    return folder


def read_reference(folder: str | Path) -> pa.Table:
    """All parts, in their order."""
    return read_folder(place(folder), "part-*.parquet")


class ShardReference:
    """Scores the texts of one part and writes their log-probabilities as one part."""

    def __init__(
        self,
        files: dict[int, list[Place]],
        folder: str,
        model: str,
        dtype: str,
        section: PolicySection,
        source: TextSource,
        temperature: float,
        lora: str | None,
    ):
        self._files, self._folder, self._source = files, folder, source
        without_sklearn()
        phase(f"loading {Path(model).name}")
        self._scorer = ReferenceScorer(
            model, dtype, section, per_token=source.per_token, temperature=temperature, lora=lora
        )
        phase(FIRST_WORK)

    def __call__(self, row: Row) -> Row:
        part = int(row["shard"])
        users, groups = self._source.read(self._files[part])
        found = self._source.table(users, self._scorer(groups))
        write_part(self._folder, self._source.schema, found, part)
        return {"shard": part, "users": len(found)}
