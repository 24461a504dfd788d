"""What summary.json says about where its figures come from."""

from __future__ import annotations

import json
import os

from dpo4rec_ray.store.versions import machine


def test_the_machine() -> None:
    found = machine()
    assert found["cpus"] == os.cpu_count()
    assert 0 < found["memory_gib"] < 2**20 and found["gpus"] >= 0
    assert "Linux" in found["platform"]
    assert json.loads(json.dumps(found)) == found
