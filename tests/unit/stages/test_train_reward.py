from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dpo4rec_ray.config import default_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers.fit import ListData
from dpo4rec_ray.stages.train_reward import another_user, check_reads, without_fold
from dpo4rec_ray.store.artifacts import Manifest, RunDir


def test_a_fold_is_neither_trained_on_nor_chosen_by() -> None:
    users = torch.tensor([0, 1, 2, 2, 3])
    nothing = torch.zeros(5, 2)
    lists = ListData(nothing.long(), nothing, nothing.bool(), users, users)
    folds = torch.tensor([0, 1, 0, 1])
    assert without_fold(lists, folds, 0).user_ids.tolist() == [1, 3]
    assert without_fold(lists, folds, 1).user_ids.tolist() == [0, 2, 2]
    with pytest.raises(UserError, match="all lists of a split are of users of fold 0"):
        without_fold(lists, torch.zeros(4, dtype=torch.long), 0)


@pytest.mark.parametrize("seed", range(20))
def test_nobody_keeps_the_own_vector(seed: int) -> None:
    users = np.array([1, 4, 5, 8, 9])
    other = another_user(users, 12, seed)
    assert (other[users] != users).all()
    assert sorted(other[users]) == users.tolist()
    rest = np.setdiff1d(np.arange(12), users)
    assert (other[rest] == rest).all()


def measured(folder: Path, ci95: list[float]) -> RunDir:
    """A run whose reward's rerankers lose this much with another user's text."""
    store = RunDir(folder)
    store.start("reward")
    store.finish(Manifest("reward", "", 1, stats={"shuffle_drop_ci95": ci95}))
    return store


def test_rerankers_that_read_let_the_run_go_on(tmp_path: Path) -> None:
    check_reads(default_config([]), measured(tmp_path, [0.001, 0.02]), 1)


@pytest.mark.parametrize(
    ("ci95", "words"),
    [
        ([-0.001, 0.02], r"95 % interval \[-0\.0010, 0\.0200\]"),
        ([0.0, 0.0], r"95 % interval \[0\.0000, 0\.0000\]"),
        ([float("nan"), float("nan")], "95 % interval unknown"),
    ],
)
def test_rerankers_that_do_not_read_stop_the_run_before_an_llm_is_trained(
    tmp_path: Path, ci95: list[float], words: str
) -> None:
    store = measured(tmp_path, ci95)
    with pytest.raises(UserError, match=rf"do not read: .*{words}.*reward\.must_read = false"):
        check_reads(default_config([]), store, 1)
    check_reads(default_config(["reward.must_read=false"]), store, 1)
    check_reads(default_config(["llm.source=statistics"]), store, 1)  # nothing is trained on the rewards
