"""What makes a stage run again, where a section says too much."""

from __future__ import annotations

import pytest

from dpo4rec_ray import identity
from dpo4rec_ray.config import Config, load_config
from dpo4rec_ray.pipeline import STAGES


def fingerprint(stage: str, config: Config) -> str:
    return identity.dependencies(config, stage, 0, STAGES[stage].sections, {}).fingerprint


def test_what_is_set_for_other_backbones_trains_no_reward_anew() -> None:
    """Else what `dpo4rec search` prints for one backbone would train the LLM of another anew."""
    plain = load_config("demo")
    other = load_config("demo", ["reranker.per_backbone.dlcm={lr=0.01}"])
    own = load_config("demo", ["reranker.per_backbone.prm={lr=0.01}"])
    assert fingerprint("train_reward", other) == fingerprint("train_reward", plain)
    assert fingerprint("train_reward", own) != fingerprint("train_reward", plain)
    assert fingerprint("train_reward", own) == fingerprint(
        "train_reward", load_config("demo", ["reranker.lr=0.01"])
    )
    assert fingerprint("evaluate", other) != fingerprint("evaluate", plain)


def test_counted_texts_are_made_again_when_their_wording_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_config("demo")
    before = fingerprint("references", plain)
    monkeypatch.setattr(identity, "STATISTICS_VERSION", 2)
    assert fingerprint("references", plain) != before
    assert fingerprint("generate", plain) == fingerprint("generate", plain)
