from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_ray.store import user_rows
from dpo4rec_ray.store.user_rows import pooled_parts


@pytest.mark.parametrize(
    ("num_users", "parts"),
    [(0, [0, 1, 2, 3, 4]), (40, [0, 1, 2, 3, 4]), (41, [0, 2, 4]), (81, [0, 3]), (1000, [0])],
)
def test_parts_that_figures_over_all_users_are_made_from(
    num_users: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_rows, "POOLED_USERS", 40)
    files = [Path(f"part-{number}") for number in range(5)]
    assert pooled_parts(files, num_users) == [files[number] for number in parts]
