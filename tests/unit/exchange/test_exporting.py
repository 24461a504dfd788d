"""Which round's pairs are exported."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.exchange.exporting import round_with_pairs
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.store.schemas import SCHEMAS


def add(store: RunDir, number: int, objective: str) -> None:
    """Pairs of a turn, and the policy that was trained in it last."""
    store.start("pairs", number)
    store.write("pairs", SCHEMAS["pairs"].empty_table(), number)
    store.finish(Manifest("pairs", "", 0), number)
    store.start("policy", number)
    store.finish(Manifest("policy", "", 1, stats={"objective": objective}), number)


def test_the_only_round_with_pairs_of_its_own_training(tmp_path: Path) -> None:
    """Those of turn 1 are of an earlier run of the folder, which was DPO alone."""
    store = RunDir(tmp_path)
    add(store, 1, "best_of_n")
    add(store, 2, "dpo")
    assert round_with_pairs(store, None) == 2


def test_of_several_one_is_chosen(tmp_path: Path) -> None:
    store = RunDir(tmp_path)
    for number in (1, 2):
        add(store, number, "dpo")
    with pytest.raises(UserError, match="pairs of the rounds 1, 2; choose one with --round"):
        round_with_pairs(store, None)
    assert round_with_pairs(store, 2) == 2
