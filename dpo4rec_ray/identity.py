"""What a stage's result depends on: its inputs, the recipe, and raw files, models and wordings from outside the run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.training import TrainerSection
from dpo4rec_ray.datasets.files import file_identity
from dpo4rec_ray.knowledge.encoder import resolve_encoder
from dpo4rec_ray.knowledge.statistics import STATISTICS_VERSION
from dpo4rec_ray.knowledge.wording import PROMPT_VERSION
from dpo4rec_ray.prepare.inspection import source_of
from dpo4rec_ray.store.artifacts import fingerprint_of
from dpo4rec_ray.store.dependencies import Dependencies
from dpo4rec_ray.store.policies import model_identity
from dpo4rec_ray.texts.sources import SOURCES


def dependencies(
    config: Config, stage: str, round_id: int, sections: tuple[str, ...], inputs: dict[str, str]
) -> Dependencies:
    """Of what a stage writes in a round. sections: as `Config.section_values` takes them; inputs: as in Dependencies."""
    if (
        stage == "train_reward"
    ):  # its rerankers are of one backbone: what is set for the others changes nothing
        config = config.model_copy(update={"reranker": config.reranker.of(config.reranker.backbone)})
    if "llm" in sections and (own := SOURCES[config.llm.source].section):
        sections = (*sections, own)
    outside = outside_identity(config, stage, sections)
    values, parts = config.section_hash(*sections), (f"{name}={made}" for name, made in inputs.items())
    fingerprint = fingerprint_of(stage, str(round_id), values, " ".join(outside.values()), *parts)
    defaults = Config().section_values(*sections)
    left_out = frozenset(part[1:] for part in sections if part.startswith("-"))
    return Dependencies(fingerprint, inputs, config.section_values(*sections), outside, defaults, left_out)


def outside_identity(config: Config, stage: str, sections: tuple[str, ...]) -> dict[str, str]:
    """What a stage uses from outside the run and its recipe, in words, and its identity."""
    parts: dict[str, str] = {}
    if stage == "prepare":
        parts["raw files"] = _source_identity(config)
    if "encoder" in sections:
        parts["text encoder"] = model_identity(resolve_encoder(config.encoder.path))
    if any(name.startswith("prompt") for name in sections):
        parts["wording of the prompts"] = f"prompt {PROMPT_VERSION}"
    if stage == "references" and STATISTICS_VERSION > 1:  # the first version was not told
        parts["wording of counted texts"] = f"statistics {STATISTICS_VERSION}"
    trained: dict[str, TrainerSection] = {"policy": config.policy, "bootstrap": config.bootstrap}
    for name in trained.keys() & set(sections):
        if file := trained[name].deepspeed:
            parts[f"file of {name}.deepspeed"] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    return parts


def _source_identity(config: Config) -> str:
    """Names, sizes and times of the raw files, so that a changed download is prepared again."""
    source = source_of(config)
    files = (*source.events, *source.items, *source.users, *source.lists)
    described = [file_identity(file.path) for file in files if file.kind != "memory"]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]
