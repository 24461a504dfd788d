"""Whether two runs are the same: rows and figures."""

from __future__ import annotations

import json

import pytest

from dpo4rec_ray.store.artifacts import RunDir
from tests.conftest import Finished


def assert_same(store: RunDir, reference: Finished, within: float = 2e-3) -> None:
    """Rows are neither lost nor doubled, and evaluation says the same: DPO that was continued may differ in the last digits."""
    other = RunDir(reference.folder)
    for name, round_id in (("users", 0), ("items", 0), ("lists", 0), ("generations", 1), ("scores", 1)):
        assert store.read(name, round_id).num_rows == other.read(name, round_id).num_rows, name
    for name in ("users", "items", "lists"):
        assert store.read(name).equals(other.read(name)), name
    ids = store.read("generations", 1, columns=["user_id", "sample_id"]).to_pandas()
    assert not ids.duplicated().any()
    assert_same_figures(store, other, within)


def assert_same_figures(store: RunDir, other: RunDir, within: float) -> None:
    """Of the evaluation."""
    one, same = (json.loads((run.root / "summary.json").read_text())["systems"] for run in (store, other))
    for row, expected in zip(one, same, strict=True):
        assert row == pytest.approx(expected, abs=within), row["system"]
