"""Recipes for GPUs fit those that they are sized for; the two of Amazon-Books differ in placement alone."""

from __future__ import annotations

import pytest

from dpo4rec_ray.config import Config, load_config
from dpo4rec_ray.pipeline import STAGES, steps
from dpo4rec_ray.planning.sizes import sizes_of_recipe
from dpo4rec_ray.planning.work import WORK, Machine
from dpo4rec_ray.train.learners import LEARNERS

BOOKS = {"amazon_books": 8, "amazon_books_one_gpu": 1}
RECIPES = BOOKS | dict.fromkeys(("ml1m", "ml1m_real", "amazon_beauty", "amazon23_books"), 1)
SIZES = {"users": 10_000, "items": 10_000, "interactions": 1_000_000}


@pytest.mark.parametrize(("name", "gpus"), RECIPES.items())
def test_no_stage_asks_for_more_gpus_than_there_are(name: str, gpus: int) -> None:
    config = load_config(name)
    sizes = sizes_of_recipe(config, SIZES, None)
    asked = {
        stage: WORK[stage](config, sizes, Machine(96, gpus), number).gpus for stage, number in steps(config)
    }
    assert max(asked.values()) <= gpus + 1e-9
    assert asked["generate"] >= 0.9 * gpus and asked["dpo"] == gpus


@pytest.mark.parametrize("name", RECIPES)
def test_engines_find_their_gpus_wherever_encoders_are(name: str) -> None:
    """If all encoders lie on one GPU, what is left there must still hold an engine."""
    config = load_config(name)
    encoders = config.encoder.num_workers * config.encoder.gpus_per_worker
    assert encoders + config.generate.gpus_per_engine <= 1 + 1e-9
    assert config.policy.global_batch_size == 32
    assert config.generate.gpu_memory_utilization < config.generate.gpus_per_engine


def test_both_make_the_same_run() -> None:
    def identity(config: Config, stage: str) -> object:
        return config.section_values(*STAGES[stage].sections)

    large, small = (load_config(name) for name in BOOKS)
    assert large.policy.global_batch_size == small.policy.global_batch_size
    differing = {stage for stage in STAGES if identity(large, stage) != identity(small, stage)}
    assert differing == set(LEARNERS), "what has the section [policy]"
