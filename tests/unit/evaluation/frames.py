"""Small per_list frames, written by hand or drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from dpo4rec_ray.evaluation.systems import METRIC_NAMES

Fits = dict[tuple[str, str, int], list[float]]

# Lists 10 and 11 are user 1's, 12 user 2's, 13 user 3's; list 13 has no positive. Eighths are exact in float32.
LISTS, USERS = [10, 11, 12, 13], [1, 1, 2, 3]
SIMPLE: Fits = {
    ("none", "random", 0): [0.25, 0.25, 0.0, 0.0],
    ("none", "popularity", 0): [0.5, 0.25, 0.25, 0.0],
    ("none", "upper-bound", 0): [1.0, 1.0, 1.0, 0.0],
}
DLCM: Fits = {
    ("dlcm", "backbone", 0): [0.5, 0.25, 0.5, 0.0],
    ("dlcm", "backbone", 1): [0.5, 0.5, 0.75, 0.0],
    ("dlcm", "base-llm", 0): [0.75, 0.25, 0.5, 0.0],
    ("dlcm", "base-llm", 1): [0.75, 1.0, 0.75, 0.0],
    ("dlcm", "dpo4rec-round1", 0): [1.0, 0.5, 0.5, 0.0],
    ("dlcm", "dpo4rec-round1", 1): [1.0, 1.0, 0.5, 0.0],
}
ABOUT = pd.DataFrame(
    {"list_id": LISTS, "history_length": [8, 8, 15, 30], "popularity": [2.0, 12.5, 3.25, np.nan]}
)


def frame(fits: Fits, lists: list[int] = LISTS, users: list[int] = USERS) -> pd.DataFrame:
    """per_list in an arbitrary row order: every metric has the value given, map_paper half of it."""
    parts: list[pd.DataFrame] = []
    for (backbone, system, seed), values in fits.items():
        part = pd.DataFrame({"list_id": lists, "user_id": users})
        part["system"], part["backbone"], part["seed"] = system, backbone, np.int32(seed)
        scale = [0.5 if name.startswith("map_paper") else 1.0 for name in METRIC_NAMES]
        part[list(METRIC_NAMES)] = np.outer(values, scale).astype(np.float32)
        parts.append(part)
    return pd.concat(parts).sample(frac=1.0, random_state=3, ignore_index=True)


def random_frame(
    systems: list[tuple[str, str, int]], num_lists: int = 150, num_users: int = 25
) -> pd.DataFrame:
    """Every metric has its own random values, users with 1 to many lists."""
    rng = np.random.default_rng(11)
    users = np.r_[np.arange(num_users), rng.integers(0, num_users, num_lists - num_users) ** 2 // num_users]
    parts: list[pd.DataFrame] = []
    for backbone, system, seed in systems:
        part = pd.DataFrame(
            rng.random((num_lists, len(METRIC_NAMES))).astype(np.float32), columns=METRIC_NAMES
        )
        part.insert(0, "list_id", np.arange(num_lists) * 7 % num_lists + 1000)
        part.insert(1, "user_id", users)
        part["system"], part["backbone"], part["seed"] = system, backbone, seed
        parts.append(part)
    return pd.concat(parts).sample(frac=1.0, random_state=5, ignore_index=True)


def only(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row with these values."""
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return found[0]
