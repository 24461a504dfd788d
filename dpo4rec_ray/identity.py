"""Identity of what a stage's result depends on from outside the run and its recipe: raw files, models, versions of texts."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.training import TrainerSection
from dpo4rec_ray.datasets.files import absolute, file_identity
from dpo4rec_ray.knowledge.encoder import resolve_encoder
from dpo4rec_ray.knowledge.prompts import PROMPT_VERSION
from dpo4rec_ray.knowledge.statistics import STATISTICS_VERSION
from dpo4rec_ray.knowledge.template import TEMPLATE_VERSION
from dpo4rec_ray.prepare.inspection import source_of
from dpo4rec_ray.store.artifacts import RunDir, folder_hash
from dpo4rec_ray.store.policies import base_llm_path

SOURCE_SECTIONS = {"openai": "openai", "table": "texts"}  # llm.source -> its own section


def base_llm_identity(config: Config, store: RunDir) -> str:
    """Identity of policy 0: the bootstrap's production, a local folder's content, a hub name, or what stands in its place."""
    if config.llm.source == "statistics":
        return f"statistics {STATISTICS_VERSION}"
    if config.llm.source == "template":
        return f"template {TEMPLATE_VERSION}"
    if config.llm.source == "openai":
        return f"openai {config.openai.model}"
    if config.llm.source == "table":
        described = [
            file_identity(absolute(path)) for path in (config.texts.users, config.texts.items) if path
        ]
        return f"table {hashlib.sha256(chr(10).join(described).encode()).hexdigest()[:16]}"
    if config.llm.path == "bootstrap":
        return store.require("base_llm").produced
    return _folder_or_name(base_llm_path(config, store))


def outside_identity(config: Config, stage: str, sections: tuple[str, ...]) -> str:
    """Identity of what a stage uses from outside the run and its recipe: raw files, encoder weights, the prompt's wording."""
    parts: list[str] = []
    if stage == "prepare":
        parts.append(_source_identity(config))
    if "encoder" in sections:
        parts.append(_folder_or_name(resolve_encoder(config.encoder.path)))
    if "llm" in sections and config.llm.source in SOURCE_SECTIONS:
        parts.append(config.section_hash(SOURCE_SECTIONS[config.llm.source]))
    if any(name.startswith("prompt") for name in sections):
        parts.append(f"prompt {PROMPT_VERSION}")
    trained: dict[str, TrainerSection] = {"dpo": config.dpo, "bootstrap": config.bootstrap}
    for name in trained.keys() & set(sections):
        if file := trained[name].deepspeed:
            parts.append(hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16])
    return " ".join(parts)


def _folder_or_name(path: str) -> str:
    return folder_hash(path) if Path(path).is_dir() else path


def _source_identity(config: Config) -> str:
    """Names, sizes and times of the raw files, so that a changed download is prepared again."""
    source = source_of(config)
    files = (*source.events, *source.items, *source.users, *source.lists)
    described = [file_identity(file.path) for file in files if file.kind != "memory"]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]
