"""The room that is checked before a run is the room that its stages ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_ray.config import load_config
from dpo4rec_ray.stages import score
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.texts.sampling import ShardGenerator, text_pool
from dpo4rec_ray.texts.vectors import VectorWriter, encoder_pool
from dpo4rec_ray.workers import placement, stage_workers
from dpo4rec_ray.workers.room import ALL
from dpo4rec_ray.workers.stage_workers import reward_trainer

CHANGES = [
    "llm.source=template",
    "generate.keep_engines=false",
    "generate.num_engines=5",
    "generate.min_engines=2",
    "generate.cpus_per_engine=3",
    "generate.label_selector.zone=a",
    "encoder.num_workers=3",
    "encoder.gpus_per_worker=0.25",
    "encoder.accelerator_type=A10G",
    "reward.num_scorers=2",
    "reward.memory_gib=1",
    "policy.min_workers=1",
    "policy.zero_stage=0",
]


def test_pools_and_what_is_checked_are_the_same(tmp_path: Path) -> None:
    config = load_config("demo", CHANGES)
    found = stage_workers.stage_workers(config)
    encoders = encoder_pool(config, VectorWriter, folder="").workers
    writers = text_pool(
        config,
        RunDir(tmp_path),
        ShardGenerator,
        stage="generate",
        round_id=1,
        policy_round=0,
        folder="",
        samples_per_shard=1,
    ).workers
    assert found["encode"] == [writers, encoders]
    assert found["generate"] == [writers] and (writers.count, writers.least) == (5, 2)
    assert found["score"] == [encoders, score.scorer_pool(config, RunDir(tmp_path), 1).workers]


def test_stages_by_recipe() -> None:
    assert list(stage_workers.stage_workers(load_config("demo"))) == [
        "prepare", "encode", "train_reward", "generate", "score", "dpo", "evaluate",
    ]  # fmt: skip
    untrained = load_config("demo", ["llm.source=statistics"])
    assert "dpo" not in stage_workers.stage_workers(untrained)
    assert list(stage_workers.stage_workers(load_config("demo", ["run.num_rounds=0"]))) == [
        "prepare",
        "encode",
        "evaluate",
    ]
    assert "bootstrap" in stage_workers.stage_workers(load_config("demo", ["llm.path=bootstrap"]))


def test_a_pool_goes_on_with_fewer_only_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("demo", ["generate.num_engines=4", "generate.keep_engines=false"])
    monkeypatch.setattr(placement, "joined_cluster", lambda: False)
    assert stage_workers.engines(config).least == ALL
    monkeypatch.setattr(placement, "joined_cluster", lambda: True)
    assert stage_workers.engines(config).least == 1
    trainers = stage_workers.trainers(config.policy, "dpo")
    assert trainers.fewest == config.policy.num_workers
    assert trainers.keys.startswith("policy.num_workers"), "what a user can change"
    kept = load_config("demo", ["generate.num_engines=4"])
    assert stage_workers.engines(kept).least == ALL


def test_training_of_the_reward_runs_where_the_reward_does() -> None:
    config = load_config("demo", ["reward.num_workers=3", "reward.label_selector.zone=a"])
    section = reward_trainer(config)
    assert (section.num_workers, section.label_selector) == (3, {"zone": "a"})
