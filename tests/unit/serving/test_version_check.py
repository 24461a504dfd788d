"""The recorded requests that a version has to answer as when it was published."""

from __future__ import annotations

import json

import pytest

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving.registry import Registry
from dpo4rec_ray.serving.version_check import load_version


@pytest.mark.parametrize("scores", [[], [0.0], "nothing", None])
def test_a_version_whose_record_is_damaged_is_refused(registry: Registry, scores: object) -> None:
    file = registry.folder("v2") / "recorded.json"
    recorded = json.loads(file.read_text(encoding="utf-8"))
    recorded[3]["scores"] = scores
    file.write_text(json.dumps(recorded), encoding="utf-8")
    with pytest.raises(UserError, match=r"recorded\.json"):
        registry.promote("v2")


def test_the_check_gives_the_recorded_scores(registry: Registry) -> None:
    """A change in the fourth decimal is seen."""
    file = registry.folder("v2") / "recorded.json"
    recorded = json.loads(file.read_text(encoding="utf-8"))
    load_version(registry.folder("v2"))
    recorded[-1]["scores"][-1] += 5e-4
    file.write_text(json.dumps(recorded), encoding="utf-8")
    with pytest.raises(UserError, match=f"request {len(recorded) - 1} "):
        load_version(registry.folder("v2"))
