"""Identity of what a stage's result depends on from outside the run and its recipe: raw files, models, versions of texts."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.training import TrainerSection
from dpo4rec_ray.datasets.files import file_identity
from dpo4rec_ray.knowledge.encoder import resolve_encoder
from dpo4rec_ray.knowledge.prompts import PROMPT_VERSION
from dpo4rec_ray.prepare.inspection import source_of
from dpo4rec_ray.store.policies import model_identity
from dpo4rec_ray.texts.sources import SOURCES


def outside_identity(config: Config, stage: str, sections: tuple[str, ...]) -> str:
    """Identity of what a stage uses from outside the run and its recipe: raw files, encoder weights, the prompt's wording."""
    parts: list[str] = []
    if stage == "prepare":
        parts.append(_source_identity(config))
    if "encoder" in sections:
        parts.append(model_identity(resolve_encoder(config.encoder.path)))
    if "llm" in sections and (own := SOURCES[config.llm.source].section):
        parts.append(config.section_hash(own))
    if any(name.startswith("prompt") for name in sections):
        parts.append(f"prompt {PROMPT_VERSION}")
    trained: dict[str, TrainerSection] = {"dpo": config.dpo, "bootstrap": config.bootstrap}
    for name in trained.keys() & set(sections):
        if file := trained[name].deepspeed:
            parts.append(hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16])
    return " ".join(parts)


def _source_identity(config: Config) -> str:
    """Names, sizes and times of the raw files, so that a changed download is prepared again."""
    source = source_of(config)
    files = (*source.events, *source.items, *source.users, *source.lists)
    described = [file_identity(file.path) for file in files if file.kind != "memory"]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]
