from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.stages.evaluate import read_evaluation
from dpo4rec_ray.store.artifacts import Manifest, RunDir, write_json


@pytest.mark.parametrize("name", ["metrics.json", "figures.json"])
def test_what_an_evaluation_wrote_is_read_under_both_names(name: str, tmp_path: Path) -> None:
    """Releases before 0.2 wrote figures.json."""
    store = RunDir(tmp_path)
    folder = store.start("per_list")
    with pytest.raises(UserError, match="per_list first"):
        read_evaluation(store)
    store.finish(Manifest("per_list", "", 0))
    with pytest.raises(UserError, match=r"metrics\.json is missing; remove .* and run the recipe again$"):
        read_evaluation(store)
    write_json(folder / name, {"systems": [1]})
    assert read_evaluation(store) == {"systems": [1]}
