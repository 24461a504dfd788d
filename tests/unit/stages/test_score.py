"""What the stage's scorer writes; the rewards themselves are in test_text_rewards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo4rec_ray.config import load_config
from dpo4rec_ray.rerankers.text_rewards import YARDSTICK, SampleRewards
from dpo4rec_ray.stages import score
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.store.schemas import SCHEMAS
from tests.conftest import DEMO

METRICS = ("log_likelihood", "ndcg@5", YARDSTICK)


class Rewards:
    """Three samples of users 4 and 7; the other users' rewards are those of the first metric alone."""

    def rewards(self, user_ids: np.ndarray, vectors: np.ndarray) -> SampleRewards:
        by_metric = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
        return SampleRewards(
            METRICS, by_metric, by_metric - 1, by_metric + 1, np.full((3, 3), 0.3), np.array([5, 5, 2])
        )

    def rewards_of_others(self, user_ids, vectors, num_others, seed, *, metrics) -> SampleRewards:
        assert (num_others, metrics) in (
            (6, ("log_likelihood",)),
            (score.WATCHED_OTHERS, ("log_likelihood",)),
        )
        worth = np.array([[0.5], [3.0], [np.nan]])[: len(user_ids)]
        error = np.full((len(user_ids), 1), 0.4)
        return SampleRewards(
            metrics, worth, worth - 0.5, worth + 0.5, error, np.array([6, 6, 0])[: len(user_ids)]
        )


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(score, "sample_scorer", lambda *_: Rewards())
    monkeypatch.setattr(score, "phase", lambda _: None)

    def scores(*changes: str) -> tuple[list[dict], list[dict]]:
        store = RunDir(tmp_path)
        for name in ("scores", "metric_scores"):
            store.start(name, 1)
        row = {
            "shard": 0,
            "user_ids": np.array([4, 4, 7]),
            "sample_ids": np.array([0, 1, 0]),
            "vectors": np.zeros((3, 2), np.float32),
        }
        answer = score.ShardScorer(load_config(DEMO, list(changes)), store, 1)(row)
        assert answer == {"shard": 0, "rows": 3, "users": 2}
        for name in ("scores", "metric_scores"):
            store.finish(Manifest(name, "", 3), 1)
        return store.read("scores", 1).to_pylist(), store.read("metric_scores", 1).to_pylist()

    return scores


def test_the_plain_reward_is_the_default(scored) -> None:
    rows, by_metric = scored()
    assert [row["reward"] for row in rows] == [row["plain_reward"] for row in rows] == [1.0, 4.0, 7.0]
    assert all(np.isnan(row["others_reward"]) for row in rows)
    assert [row["metric"] for row in by_metric] == [*METRICS] * 3


def test_the_personal_reward_is_what_pairs_are_made_of(scored) -> None:
    """1 - .5, 4 - 3, and nothing for a user without others; halves (0 - 0) and (2 - 1); error of 3, 4, 5."""
    rows, by_metric = scored("reward.personal=6")
    np.testing.assert_allclose([row["reward"] for row in rows], [0.5, 1.0, np.nan])
    np.testing.assert_allclose([row["plain_reward"] for row in rows], [1.0, 4.0, 7.0])
    np.testing.assert_allclose([row["others_reward"] for row in rows], [0.5, 3.0, np.nan])
    np.testing.assert_allclose([row["std_error"] for row in rows], 0.5)
    assert [row["metric"] for row in by_metric] == ["personal log_likelihood", *METRICS] * 3
    first = by_metric[0]
    assert (first["reward"], first["half_a"], first["half_b"]) == (0.5, 0.0, 1.0)
    assert by_metric[1]["reward"] == 1.0, "the plain reward stays beside it"


def test_with_several_turns_watched_users_texts_are_tried_on_others(scored, tmp_path: Path) -> None:
    """User 4 is a validation user, 7 is trained on; the reward stays the plain one."""
    users = {name: [None, None] for name in SCHEMAS["users"].names}
    users |= {"user_id": [4, 7], "split": ["valid", "train"]}
    store = RunDir(tmp_path)
    store.start("users")
    store.write("users", pa.table(users, schema=SCHEMAS["users"]))
    store.finish(Manifest("users", "", 2))
    rows, _ = scored("run.turns_per_round=2", "run.watched_users=1")
    np.testing.assert_allclose([row["others_reward"] for row in rows], [0.5, 3.0, np.nan])
    assert [row["reward"] for row in rows] == [row["plain_reward"] for row in rows] == [1.0, 4.0, 7.0]
