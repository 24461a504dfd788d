"""Which systems an evaluation has, what they are called, and which of them are fitted together."""

from __future__ import annotations

import pytest

from dpo4rec_ray.config import Config, default_config
from dpo4rec_ray.stages.evaluate import _jobs, _part, all_texts, system_name

BACKBONES = 'evaluate.backbones=["dlcm", "prm"]'


@pytest.mark.parametrize(
    ("changes", "last_round", "expected"),
    [
        ([], 2, ["backbone", "statistics", "random-texts", "base-llm", "dpo4rec-round1", "dpo4rec-round2"]),
        (["llm.source=statistics"], 0, ["backbone", "random-texts", "statistics"]),
        (['evaluate.references=["random"]'], 0, ["backbone", "random-texts", "base-llm"]),
        (["evaluate.references=[]"], 1, ["backbone", "base-llm", "dpo4rec-round1"]),
    ],
)
def test_systems_are_nothing_then_references_then_rounds(
    changes: list[str], last_round: int, expected: list[str]
) -> None:
    """Texts that the rounds start from are no reference beside themselves, and every system has a name of its own."""
    config = default_config(changes)
    assert [system_name(config, texts) for texts in all_texts(config, last_round)] == expected


def every_fit(config: Config) -> list[tuple[str, int | str | None, int]]:
    return [
        (backbone, texts, seed)
        for texts in all_texts(config, 1)
        for backbone in config.evaluated_backbones
        for seed in range(2)
    ]


def test_systems_behind_one_backbone_are_one_task() -> None:
    config = default_config([BACKBONES])
    jobs = _jobs(config, every_fit(config))
    texts = (None, "statistics", "random", 0, 1)
    assert sorted(jobs) == [(name, texts, seed) for name in ("dlcm", "prm") for seed in (0, 1)]


def test_in_the_input_layer_every_system_is_a_task_of_its_own() -> None:
    config = default_config([BACKBONES, 'reranker.per_backbone.dlcm={knowledge="input"}'])
    jobs = _jobs(config, every_fit(config))
    assert [job for job in jobs if job[0] == "dlcm"] == [
        ("dlcm", (texts,), seed) for texts in (None, "statistics", "random", 0, 1) for seed in (0, 1)
    ]
    assert [len(texts) for name, texts, _ in jobs if name == "prm"] == [5, 5]


def test_every_fit_has_a_part_of_its_own() -> None:
    config = default_config([BACKBONES, "evaluate.num_seeds=2"])
    texts = all_texts(config, 1)
    parts = [_part(config, texts, *fit) for fit in every_fit(config)]
    assert parts == list(range(20))
