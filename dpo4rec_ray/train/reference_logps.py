"""The reference's log-probabilities of the round's pairs, by a pool of actors, stored beside the pairs.

The folder's name is a hash of the reference and of everything that shapes the numbers. A run that is repeated with the same
reference finds them there, whatever else in [dpo] has changed.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.training import DPOSection
from dpo4rec_ray.policy.reference_scorer import ReferenceScorer
from dpo4rec_ray.storage.parquet import read_folder, read_parquet
from dpo4rec_ray.storage.places import Place, place
from dpo4rec_ray.store.artifacts import RunDir, fingerprint_of, write_part
from dpo4rec_ray.store.policies import model_identity
from dpo4rec_ray.store.progress import Progress
from dpo4rec_ray.workers.phases import FIRST_WORK, phase
from dpo4rec_ray.workers.placement import without_sklearn
from dpo4rec_ray.workers.shards import Pool, Row, part_number, resume_parts, run_shards


def cached_reference(config: Config, store: RunDir, round_id: int, model: str) -> Place:
    """Compute what is missing. Returns the folder, with one part per part of `pairs`."""
    section = config.dpo
    identity = model_identity(model)
    pairs = store.require("pairs", round_id)
    fingerprint = fingerprint_of(
        identity, config.llm.dtype, section.quantize, pairs.fingerprint, pairs.produced
    )
    folder = store.path("pairs", round_id) / "reference" / fingerprint
    files = {part_number(file): file for file in store.files("pairs", round_id)}
    done = resume_parts(folder, fingerprint)
    pool = Pool(
        ShardReference,
        {
            "files": files,
            "folder": str(folder),
            "model": model,
            "dtype": config.llm.dtype,
            "section": section,
        },
        section.num_workers,
        section.cpus_per_worker,
        num_gpus=section.gpus_per_worker,
        where=section,
        what="workers of dpo",
    )
    shards = [(part, 0, 0) for part in sorted(set(files) - done)]
    progress = Progress("reference", pairs.rows, "pairs")
    for _ in run_shards(shards, [pool], progress):
        pass
    return folder


def read_reference(folder: str | Path) -> pa.Table:
    """All parts, in the pairs' order."""
    return read_folder(place(folder), "part-*.parquet")


class ShardReference:
    """Scores the pairs of one part and writes their log-probabilities as one part."""

    def __init__(self, files: dict[int, Place], folder: str, model: str, dtype: str, section: DPOSection):
        self._files, self._folder = files, folder
        without_sklearn()
        phase(f"loading {Path(model).name}")
        self._scorer = ReferenceScorer(model, dtype, section)
        phase(FIRST_WORK)

    def __call__(self, row: Row) -> Row:
        part = int(row["shard"])
        found = self._scorer(read_parquet(self._files[part]))
        write_part(self._folder, "reference_logps", found, part)
        return {"shard": part, "users": len(found)}
