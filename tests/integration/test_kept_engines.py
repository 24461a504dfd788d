"""Engines that stay warm between stages: the same texts as fresh ones, another policy without another start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo4rec_ray.config import load_config
from dpo4rec_ray.knowledge.engine_loop import EngineDied
from dpo4rec_ray.knowledge.engine_spec import ServedWeights
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.texts.engines import KeptGenerator, begin_stage, kept_engines, release_engines
from dpo4rec_ray.texts.policy_texts import engine_spec, served_weights
from tests.conftest import DEMO, ROOT, TINY, Finished, run_job

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

KEEP = [
    "generate.keep_engines=true",
    "generate.num_engines=1",
    "generate.cpus_per_engine=0.4",
    "encoder.cpus_per_worker=0.4",
    "policy.num_workers=1",
]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    import ray

    ray.init(
        address="local", include_dashboard=False, log_to_driver=False, num_cpus=2, object_store_memory=2**27
    )
    yield
    release_engines()
    ray.shutdown()


def other_policy(folder: Path) -> str:
    """The bundled LLM with weights that say something else."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(ROOT / "dpo4rec_ray/policy/bundled", folder)
    (weights,) = folder.glob("*.safetensors")
    tensors = {name: value * 0.8 for name, value in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    return str(folder)


def test_a_warm_engine_switches_and_a_killed_one_comes_back(local_ray: None, tmp_path: Path) -> None:
    import ray

    config = load_config(ROOT / DEMO, KEEP)
    store = RunDir(tmp_path)
    spec = engine_spec(config, served_weights(config, store, 0), 0)
    base_model = spec.weights.model
    other = other_policy(tmp_path / "other")
    prompts, seeds, counts = [[1, 5, 6, 7, 8, 9], [1, 9, 8, 7]], [3, 4], [2, 2]

    def texts(generator: KeptGenerator) -> list[list[str]]:
        answers = generator.generate(prompts, seeds, counts)
        return [[sample.text for sample in answer.samples] for answer in answers]

    def kept(model: str, owner: str = "stage") -> KeptGenerator:
        return KeptGenerator(engines, ServedWeights(model), owner)

    engines = kept_engines(config, spec, store.root)
    begin_stage(engines)
    base = texts(kept(base_model))
    assert kept(base_model).stats().samples == 4
    assert kept_engines(config, spec, store.root) == engines
    begin_stage(engines)
    assert kept(base_model).stats().samples == 0, "every stage has its own figures"
    changed = texts(kept(other))
    assert changed != base
    assert texts(kept(base_model)) == base
    with pytest.raises(RuntimeError, match="none of 1 engines is free for another"):
        kept(base_model, owner="another")

    generator = kept(other)
    ray.kill(engines[0], no_restart=False)
    with pytest.raises(EngineDied):
        texts(generator)
    # What a restarted sampling actor does: it waits for the engine to come back, and is the owner again.
    assert texts(kept(other)) == changed, "it serves what it is asked for, not what it was made with"


@pytest.mark.slow
def test_a_whole_run_starts_its_engines_once(tmp_path: Path, tiny_run: Finished) -> None:
    done = run_job(tmp_path, DEMO, *TINY, *KEEP)
    assert done.code == 0, done.stderr
    stores = RunDir(done.folder), RunDir(tiny_run.folder)
    for name, round_id in (("knowledge", 0), ("generations", 1)):
        mine, theirs = (
            sorted(store.read(name, round_id, columns=["text"])["text"].to_pylist()) for store in stores
        )
        assert mine == theirs, name
    starts = [
        next(iter(stores[0].require(name, round_id).stats["this_run"]["engines"].values()))
        for name, round_id in (("knowledge", 0), ("generations", 1), ("knowledge", 1))
    ]
    assert len({start["start_s"] for start in starts}) == 1, "one start, seen by three stages"
    before = sorted(stores[0].read("knowledge", 1, columns=["text"])["text"].to_pylist())
    again = run_job(
        tmp_path, DEMO, *TINY, *KEEP, "generate.keep_engines=false", "--only", "encode", "--round", "1"
    )
    assert again.code == 0, again.stderr
    assert sorted(stores[0].read("knowledge", 1, columns=["text"])["text"].to_pylist()) == before
