"""How the texts of a published version are written: the settings of its run, and an engine with its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo4rec_ray.config import Config, read_config
from dpo4rec_ray.config.serving import ServingSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.catalogue_prompts import ExampleUser
from dpo4rec_ray.knowledge.engine_spec import LOAD_FORMATS, OWN_ARGUMENTS, EngineSpec, ServedWeights
from dpo4rec_ray.models.gguf_folder import model_folder
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.version_files import WRITER_EXAMPLES, WRITER_FOLDER, WRITER_LLM, WRITER_LORA
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.policies import base_llm_path
from dpo4rec_ray.texts.policy_texts import engine_spec

GPU_MEMORY = 0.9  # share of the writer's GPU, or of its part of one, that the engine takes


@dataclass(frozen=True)
class WriterSetup:
    """What a writer needs to know about a version."""

    version: str
    config: Config
    engine: EngineSpec
    examples: tuple[ExampleUser, ...] = ()

    @property
    def process(self) -> tuple[Any, ...]:
        """What a running process cannot change. Versions that are equal in it can share a process."""
        model = model_folder(self.engine.weights.model)
        file = Path(model) / "config.json"
        shape = file.read_text(encoding="utf-8") if file.is_file() else model
        return shape, self.engine.fixed, self.config.encoder


def read_setup(registry: Registry, version: str, settings: ServingSection) -> WriterSetup:
    """The setup of a version on the CPUs and GPUs that `settings` give the writer.

    Raises:
        UserError: the version has no LLM, or its LLM cannot or must not run there.
    """
    folder = registry.folder(version) / WRITER_FOLDER
    if not (folder / "config.json").is_file():
        raise UserError(
            f'serving.online_llm = "async": version {version} has no texts written under vLLM (llm.source = "vllm"), so '
            'no LLM is there to write more; promote a version that has, or set serving.online_llm = "off"'
        )
    config, gpus = read_config(folder), settings.writer_gpus
    placed: dict[str, Any] = {
        "gpus_per_engine": gpus,
        "cpus_per_engine": settings.writer_cpus,
        "keep_engines": False,
        "gpu_memory_utilization": GPU_MEMORY * min(1.0, gpus or 1.0),
    }
    if not gpus:
        placed |= {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    section = config.generate.model_copy(update=placed)
    config = config.model_copy(update={"generate": section})
    processes = section.tensor_parallel_size * section.pipeline_parallel_size
    if processes > 1 and gpus != processes:
        raise UserError(
            f"serving.writer_gpus = {gpus:g}, but the LLM of version {version} takes {processes}; set it to {processes}"
        )
    extra = section.engine_args
    if extra.keys() & OWN_ARGUMENTS or extra.get("load_format", LOAD_FORMATS[0]) not in LOAD_FORMATS:
        raise UserError(f"{folder}: engine_args {extra} are refused; publish the run again")
    llm, loras = folder / WRITER_LLM, [folder / name for name in (WRITER_LORA, "adapter")]
    weights = ServedWeights(
        str(llm) if llm.is_dir() else base_llm_path(config, RunDir(folder)),
        next((str(lora) for lora in loras if lora.is_dir()), None),  # "adapter": the former name
    )
    file = folder / WRITER_EXAMPLES
    examples = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return WriterSetup(
        version, config, engine_spec(config, weights, 0), tuple(ExampleUser(**one) for one in examples)
    )


def newest_setup(registry: Registry, settings: ServingSection) -> WriterSetup:
    """The setup of the current version, or if it has no LLM, of the newest previous version that has one.

    Raises:
        UserError: no version has an LLM; the message is about the current version.
    """
    routing = registry.routing()
    errors = []
    for version in (routing.current, *reversed(routing.previous)):
        try:
            return read_setup(registry, version, settings)
        except UserError as error:
            errors.append(error)
    raise errors[0]
