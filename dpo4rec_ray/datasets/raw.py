"""What every data source hands over: columns of users, items and events, before any split or list."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RawTables:
    """One dataset. Users and items are numbered by their place in the columns; events point at places."""

    user_raw_ids: list[str]
    profiles: list[str]  # one phrase per user, "" where nothing is known
    item_raw_ids: list[str]
    titles: list[str]
    attributes: list[list[str]]  # "facet: value" strings; a facet may repeat
    user_index: NDArray[np.int64]  # [num_events], file order, which settles equal timestamps
    item_index: NDArray[np.int64]
    rating: NDArray[np.float32]
    timestamp_s: NDArray[np.int64]
    truth: list[list[str]] | None = None  # "facet: value" strings each user loves; sample world only
    quarantined: dict[str, int] = field(default_factory=dict[str, int])  # reason -> rows left out
