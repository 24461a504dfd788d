from __future__ import annotations

import numpy as np
import pytest
import torch

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers.fit import ListData
from dpo4rec_ray.stages.train_reward import another_user, without_fold


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
