from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo4rec_ray.config import load_config
from dpo4rec_ray.core.rewards import list_noise, shrink
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.stages import pair
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from tests.conftest import DEMO

NUM_USERS, NUM_SAMPLES = 30, 4


def make_store(folder: Path, rewards: np.ndarray, errors: np.ndarray, num_lists: np.ndarray) -> RunDir:
    """A run up to its scores, in two parts with rows in no order; rewards: [U, N]."""
    store = RunDir(folder)
    users = np.arange(NUM_USERS)
    empty = [[] for _ in users]
    splits = ["train"] * (NUM_USERS - 5) + ["valid"] * 5
    columns = {"user_id": users, "raw_id": users.astype(str), "profile": [""] * NUM_USERS, "split": splits}
    store.start("users")
    store.write(
        "users", pa.table({**columns, "fold": users * 0, "history_item_ids": empty, "history_ratings": empty})
    )
    store.finish(Manifest("users", "", NUM_USERS))
    for name in ("generations", "scores"):
        store.start(name, 1)
    for part, own in enumerate((users[:17], users[17:])):
        ids = {"round": np.ones(len(own) * NUM_SAMPLES, np.int32), "user_id": np.repeat(own, NUM_SAMPLES)}
        ids["sample_id"] = np.tile(np.arange(NUM_SAMPLES), len(own))
        tokens = [
            [int(user), int(sample)] for user, sample in zip(ids["user_id"], ids["sample_id"], strict=True)
        ]
        texts = {"prompt_token_ids": tokens, "token_ids": tokens, "text": [str(one) for one in tokens]}
        reason = ["stop"] * len(tokens)
        scores = {
            "reward": rewards[own].ravel(),
            "std_error": np.repeat(errors[own], NUM_SAMPLES),
            "num_lists": np.repeat(num_lists[own], NUM_SAMPLES),
        }
        order = np.random.default_rng(part).permutation(len(tokens))
        store.write("generations", pa.table({**ids, **texts, "finish_reason": reason}), 1, part)
        store.write("scores", pa.table({**ids, **scores}).take(order), 1, part)
    store.finish(Manifest("generations", "", rewards.size), 1)
    store.finish(Manifest("scores", "", rewards.size), 1)
    return store


@pytest.fixture
def measured() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards, standard errors and list counts of users whose texts differ more and less."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(NUM_USERS, NUM_SAMPLES)) * np.linspace(0.2, 2, NUM_USERS)[:, None]
    return rewards.astype(np.float32), np.full(NUM_USERS, 0.5, np.float32), rng.integers(2, 9, NUM_USERS)


def test_shrunk_rewards_decide_who_gives_a_pair(
    tmp_path: Path, measured: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    store = make_store(tmp_path, *measured)
    rewards, errors, num_lists = measured
    shrunk, _ = shrink(rewards, list_noise(errors, num_lists) / np.sqrt(num_lists))
    config = load_config(DEMO, ["pair.shrinkage=true", "pair.min_margin=1.0"])
    outcome = pair.run(config, store, 1)
    store.finish(Manifest("pairs", "", outcome.rows_out), 1)
    rows = {row["user_id"]: row for row in store.read("pairs", 1).to_pylist()}
    assert set(rows) == set(np.flatnonzero(np.ptp(shrunk, axis=1) >= 1.0).tolist())
    assert 0 < len(rows) < (np.ptp(rewards, axis=1) >= 1.0).sum()
    for user, row in rows.items():
        assert row["chosen_token_ids"] == [user, int(rewards[user].argmax())]
        assert row["rejected_token_ids"] == [[user, int(rewards[user].argmin())]]
        assert row["chosen_reward"] == pytest.approx(shrunk[user].max(), rel=1e-6)
    assert outcome.stats["dropped"] == {"below_min_margin": 25 - sum(user < 25 for user in rows)}


def test_luck_alone_is_named(tmp_path: Path, measured: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    rewards, errors, num_lists = measured
    store = make_store(tmp_path, rewards, 20 * errors, num_lists)
    config = load_config(DEMO, ["pair.shrinkage=true", "pair.min_margin=0.1"])
    with pytest.raises(UserError, match=r"no more than luck.*pair.shrinkage = false"):
        pair.run(config, store, 1)
