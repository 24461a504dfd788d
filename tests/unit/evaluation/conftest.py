"""One summary with everything in it, for the tests of the formats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from dpo4rec_ray.evaluation.tables import summarise
from tests.unit.evaluation.frames import SIMPLE, random_frame


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    """Several backbones, one of them not in the paper, one with a name that LaTeX would trip over."""
    systems = ["backbone", "base-llm", "dpo4rec-round1", "dpo4rec-round12"]
    fits = [
        (backbone, system, seed)
        for backbone in ("dlcm", "mir", "own_net&1%", "a_backbone_of_a_very_long_name")
        for system in systems
        for seed in range(2)
    ]
    per_list = random_frame([*SIMPLE, *fits])
    ids = np.unique(per_list["list_id"])
    about = pd.DataFrame({"list_id": ids, "history_length": ids % 9, "popularity": ids % 7 * 1.5})
    return summarise(per_list, about, 200, "amazon-beauty")
