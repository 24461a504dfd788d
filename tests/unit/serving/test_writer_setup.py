"""Which versions an LLM can write for, and with which settings."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo4rec_ray.config.serving import ServingSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.catalogue_prompts import ExampleUser
from dpo4rec_ray.serving import writer as writing
from dpo4rec_ray.serving.deployment import build
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.version_files import WRITER_EXAMPLES, WRITER_FOLDER, WRITER_LORA, VersionFiles
from dpo4rec_ray.serving.writer_setup import newest_setup, read_setup
from dpo4rec_ray.storage.places import copy_folder


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_a_version_without_an_llm_is_refused_at_the_start(registry: Registry, name: str) -> None:
    registry.promote(name)
    arguments = {"registry": str(registry.root), "online_llm": "async"}
    with pytest.raises(
        UserError, match=f'online_llm = "async": version {name} has no texts written under vLLM'
    ) as error:
        build(arguments)
    assert "\n" not in str(error.value)
    build(arguments | {"online_llm": "off"})


def test_without_a_version_there_is_nobody_to_write_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no version is promoted"):
        build({"registry": str(tmp_path), "online_llm": "async"})


@pytest.mark.parametrize(
    ("generate", "settings", "match"),
    [
        ({"engine_args": {"trust_remote_code": True}}, {}, "trust_remote_code.*refused"),
        ({"engine_args": {"load_format": "pt"}}, {}, "load_format.*refused"),
        (
            {"tensor_parallel_size": 2},
            {"writer_gpus": 1},
            "writer_gpus = 1, but the LLM of version v1 takes 2",
        ),
        ({"temperature": -1}, {}, "generate.temperature"),
    ],
)
def test_what_a_writer_cannot_or_must_not_run_is_refused(
    registry: Registry, generate: dict[str, object], settings: dict[str, float], match: str
) -> None:
    folder = registry.folder("v1") / WRITER_FOLDER
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"generate": generate}))
    with pytest.raises(UserError, match=match):
        read_setup(registry, "v1", ServingSection(**settings))


def test_the_writers_place_is_its_own_not_the_runs(registry: Registry) -> None:
    folder = registry.folder("v1") / WRITER_FOLDER
    (folder / "llm").mkdir(parents=True)
    run = {"gpus_per_engine": 4, "tensor_parallel_size": 4, "gpu_memory_utilization": 0.5, "temperature": 0.3}
    (folder / "config.json").write_text(json.dumps({"generate": run}))
    on_cpu = read_setup(registry, "v1", ServingSection()).engine
    assert (
        not on_cpu.on_gpu
        and on_cpu.generate.tensor_parallel_size == 1
        and on_cpu.weights.model == str(folder / "llm")
    )
    (folder / "config.json").write_text(json.dumps({"generate": run | {"tensor_parallel_size": 1}}))
    setup = read_setup(registry, "v1", ServingSection(writer_gpus=0.5))
    assert setup.engine.on_gpu and setup.engine.generate.gpu_memory_utilization == pytest.approx(0.45)
    assert setup.config.generate.temperature == 0.3


def test_examples_and_the_own_prompt_travel_with_a_version(registry: Registry) -> None:
    folder = registry.folder("v1") / WRITER_FOLDER
    folder.mkdir()
    prompt = {"examples": 1, "template": "{liked}", "lead_in": "He likes"}
    (folder / "config.json").write_text(json.dumps({"prompt": prompt, "data": {"positive_rating": 3}}))
    shown = {"user_id": 3, "profile": "a nurse", "item_ids": [0, 1], "ratings": [5.0, 2.0]}
    (folder / WRITER_EXAMPLES).write_text(json.dumps([shown, {**shown, "user_id": 4}]))
    setup = read_setup(registry, "v1", ServingSection())
    assert setup.examples == (
        ExampleUser(3, "a nurse", [0, 1], [5.0, 2.0]),
        ExampleUser(4, "a nurse", [0, 1], [5.0, 2.0]),
    )
    assert setup.config.prompt.template == "{liked}" and setup.config.like_at == 3
    (folder / WRITER_EXAMPLES).unlink()
    assert read_setup(registry, "v1", ServingSection()).examples == ()


@pytest.mark.parametrize("name", [WRITER_LORA, "adapter"])
def test_a_lora_travels_with_its_version(registry: Registry, name: str) -> None:
    """Older versions call its folder adapter."""
    folder = registry.folder("v1") / WRITER_FOLDER
    (folder / name).mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    setup = read_setup(registry, "v1", ServingSection())
    assert setup.engine.weights.lora == str(folder / name)


def test_the_newest_version_with_an_llm_is_written_for(registry: Registry) -> None:
    registry.promote("v2")
    with pytest.raises(UserError, match="version v2 has no texts written under vLLM"):
        newest_setup(registry, ServingSection())
    folder = registry.folder("v1") / WRITER_FOLDER
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert newest_setup(registry, ServingSection()).version == "v1"


def test_a_writer_reads_a_registry_on_a_bucket(
    published: Registry, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped files have to be on a disk."""
    there = Registry(s3)
    copy_folder(published.folder("v1"), there.folder("v1"))
    monkeypatch.setattr(writing, "JobPrompts", lambda setup, items: items["raw_id"].to_pylist())
    writer = object.__new__(writing.Writer)
    writer._registry, writer._changed = there, threading.Condition()
    writer._use(SimpleNamespace(version="v1"))
    assert writer._prompts == list(VersionFiles(published.folder("v1")).item_rows)
