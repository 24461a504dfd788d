from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from dpo4rec_ray.core.rewards import carry_over
from dpo4rec_ray.evaluation.reward_diagnosis import personal_diagnosis, read_matrices, reward_diagnosis
from dpo4rec_ray.rerankers.text_rewards import YARDSTICK

METRICS = ("log_likelihood", YARDSTICK, "mrr@10")
NUM_USERS, NUM_SAMPLES = 40, 5


def table(halves: dict[str, np.ndarray], users: np.ndarray) -> pa.Table:
    """metric_scores of `users`, rows by sample and then by metric as the scorer writes them; halves: [U, N, 2] by metric."""
    shape = (len(users), NUM_SAMPLES, len(METRICS))
    stacked = np.stack([halves[name] for name in METRICS], axis=2)  # [U, N, M, 2]
    # of the mean of both halves, from what they differ by: the same for all samples of a user
    rest = stacked - stacked.mean(axis=3, keepdims=True)
    rest = rest - rest.mean(axis=1, keepdims=True)
    errors = np.sqrt((rest**2).sum(axis=(1, 3), keepdims=True)[..., 0] / (NUM_SAMPLES - 1) / 2)
    errors = np.broadcast_to(errors, shape)
    return pa.table(
        {
            "user_id": np.broadcast_to(users[:, None, None], shape).ravel(),
            "sample_id": np.broadcast_to(np.arange(NUM_SAMPLES)[:, None], shape).ravel(),
            "metric": list(METRICS) * (len(users) * NUM_SAMPLES),
            "reward": stacked.mean(axis=-1).ravel(),
            "std_error": errors.ravel(),
            "num_lists": np.full(errors.size, 2),
            "half_a": stacked[..., 0].ravel(),
            "half_b": stacked[..., 1].ravel(),
        }
    )


@pytest.fixture
def halves() -> dict[str, np.ndarray]:
    """The log-likelihood holds on both halves, NDCG is luck with ties, MRR the same for all samples."""
    rng = np.random.default_rng(0)
    worth = rng.normal(size=(NUM_USERS, NUM_SAMPLES, 1))
    return {
        "log_likelihood": worth + 0.1 * rng.normal(size=(NUM_USERS, NUM_SAMPLES, 2)),
        YARDSTICK: rng.integers(0, 3, (NUM_USERS, NUM_SAMPLES, 2)) / 2 + 0.2 * worth.round(),
        "mrr@10": np.ones((NUM_USERS, NUM_SAMPLES, 2)),
    }


def test_matrices_come_back_in_user_and_sample_order(halves: dict[str, np.ndarray]) -> None:
    users = np.random.default_rng(1).permutation(NUM_USERS) + 100
    found_users, found = read_matrices(table(halves, users))
    assert found_users.tolist() == sorted(users.tolist())
    assert list(found) == list(METRICS)
    order = np.argsort(users)
    for name in METRICS:
        np.testing.assert_array_equal(found[name]["half_b"], halves[name][order, :, 1])


def test_what_carries_over_is_told_from_luck(halves: dict[str, np.ndarray]) -> None:
    users = np.arange(NUM_USERS)
    held_out = users[:10]
    found = reward_diagnosis(table(halves, users), "log_likelihood", held_out)
    own = found["metrics"]["log_likelihood"]
    assert own["carried"] > 0.9 > found["metrics"][YARDSTICK]["carried"]
    assert found["gap_held_out"] == own["gap_held_out"] and found["carried"] == own["carried"]
    assert own["best tied"] == 0.0
    assert 0.8 < own["carried_of_shrunk"] < 1.2, "what is left after shrinkage is what carries over"
    assert found["metrics"][YARDSTICK]["shrunk_gap"] < 0.5 * found["metrics"][YARDSTICK]["gap_in_sample"]
    assert found["metrics"]["mrr@10"]["all tied"] == 1.0
    assert found["metrics"]["mrr@10"]["gap_in_sample"] == 0.0
    # chosen by one metric, measured by the other
    cross = carry_over(
        *(halves[name][..., half] for name in ("log_likelihood", YARDSTICK) for half in (0, 1))
    )
    assert own["yardstick_gap"] == pytest.approx(cross.gap_held_out.mean())
    apart = found["metrics of validation users"]["log_likelihood"]
    assert apart["users_in_carry_over"] == 10
    expected = carry_over(*(halves["log_likelihood"][held_out][..., half] for half in (0, 1)))
    assert apart["gap_held_out"] == pytest.approx(expected.gap_held_out.mean())
    assert set(found["agreement"]) == {
        f"log_likelihood ~ {YARDSTICK}", "log_likelihood ~ mrr@10", f"{YARDSTICK} ~ mrr@10"
    }  # fmt: skip
    assert found["agreement"][f"log_likelihood ~ {YARDSTICK}"] > 0
    assert np.isnan(found["agreement"][f"{YARDSTICK} ~ mrr@10"])


def test_users_with_one_list_leave_it_unknown(halves: dict[str, np.ndarray]) -> None:
    single = {name: values.copy() for name, values in halves.items()}
    for values in single.values():
        values[..., 1] = np.nan
    content = table(single, np.arange(NUM_USERS))
    content = content.set_column(3, "reward", content["half_a"])
    found = reward_diagnosis(content, "log_likelihood", np.arange(3))
    assert found["users_in_carry_over"] == 0
    assert found["gap_held_out"] is None
    assert found["mean_reward"] == pytest.approx(halves["log_likelihood"][..., 0].mean())


def test_how_the_personal_reward_differs_from_the_plain_one() -> None:
    """Two users of three texts. User 4: plain 1, 2, 3, others 1, 1.5, 4, personal 0, .5, -1: ranks 2, 3, 1 against 1, 2, 3.

    Spearman of (2, 3, 1) and (1, 2, 3) is 1 - 6 (1 + 1 + 4) / (3 * 8) = -.5, with both others, as the ranks of plain and others
    are the same. User 9: plain 1, 2, 3, others 0, 0, 0: personal is plain, and others order nothing. User 11 has nobody else.
    """
    nan = float("nan")
    scores = pa.table(
        {
            "user_id": [9, 9, 9, 4, 4, 4, 11, 11, 11],
            "sample_id": [0, 1, 2, 2, 1, 0, 0, 1, 2],
            "reward": [1.0, 2.0, 3.0, -1.0, 0.5, 0.0, nan, nan, nan],
            "plain_reward": [1.0, 2.0, 3.0, 3.0, 2.0, 1.0, 1.0, 2.0, 3.0],
            "others_reward": [0.0, 0.0, 0.0, 4.0, 1.5, 1.0, nan, nan, nan],
        }
    )
    assert personal_diagnosis(scores) == {
        "agreement_with_plain": pytest.approx((1 - 0.5) / 2),
        "agreement_with_others": pytest.approx(-0.5),
        "plain_with_others": pytest.approx(1.0),
        "users_without_others": 1,
    }
