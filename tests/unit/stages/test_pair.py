from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo4rec_ray.config import load_config
from dpo4rec_ray.core.rewards import fit_shrinkage, list_noise, shrink
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.stages import pair
from dpo4rec_ray.store import user_rows
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from tests.conftest import DEMO
from tests.scored_run import NUM_SAMPLES, NUM_USERS, make_store


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
    rows = {row["user_id"]: row for row in store.read("pairs", 1).to_pylist() if row["kind"] == "own"}
    assert set(rows) == set(np.flatnonzero(np.ptp(shrunk, axis=1) >= 1.0).tolist())
    assert 0 < len(rows) < (np.ptp(rewards, axis=1) >= 1.0).sum()
    for user, row in rows.items():
        assert row["chosen_token_ids"] == [user, int(rewards[user].argmax())]
        assert row["rejected_token_ids"] == [[user, int(rewards[user].argmin())]]
        assert row["chosen_reward"] == pytest.approx(shrunk[user].max(), rel=1e-6)
    assert outcome.stats["dropped"] == {"below_min_margin": 25 - sum(user < 25 for user in rows)}


def test_of_very_many_users_some_parts_tell_how_far_rewards_are_pulled(
    tmp_path: Path, measured: tuple[np.ndarray, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two parts the first one, 17 users; pairs are made of all users, whom its shrinkage fits."""
    store = make_store(tmp_path, *measured)
    monkeypatch.setattr(user_rows, "POOLED_USERS", 20)
    rewards, errors, num_lists = measured
    own = slice(0, 17)
    noise = list_noise(errors[own], num_lists[own])
    shrinkage = fit_shrinkage(rewards[own], noise / np.sqrt(num_lists[own]))
    shrunk, _ = shrinkage(rewards, noise / np.sqrt(num_lists))
    changes = ["pair.shrinkage=true", "pair.min_margin=0.5", f"generate.num_samples={NUM_SAMPLES}"]
    rows, _ = pairs_of(store, *changes)
    rows = [row for row in rows if row["kind"] == "own"]
    assert {row["user_id"] for row in rows} == set(np.flatnonzero(np.ptp(shrunk, axis=1) >= 0.5).tolist())
    assert any(row["user_id"] >= 17 for row in rows)
    for row in rows:
        assert row["chosen_reward"] == pytest.approx(shrunk[row["user_id"]].max(), rel=1e-6)


def test_luck_alone_is_named(tmp_path: Path, measured: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    rewards, errors, num_lists = measured
    store = make_store(tmp_path, rewards, 20 * errors, num_lists)
    config = load_config(DEMO, ["pair.shrinkage=true", "pair.min_margin=0.1"])
    with pytest.raises(UserError, match=r"no more than luck.*pair.shrinkage = false"):
        pair.run(config, store, 1)


def pairs_of(store: RunDir, *changes: str) -> tuple[list[dict], dict]:
    """Rows and stats of the pairs that a recipe with these changes makes."""
    outcome = pair.run(load_config(DEMO, list(changes)), store, 1)
    store.finish(Manifest("pairs", "", outcome.rows_out), 1)
    rows = store.read("pairs", 1).to_pylist()
    assert len(rows) == outcome.rows_out
    return rows, outcome.stats


def test_the_default_is_the_papers_pair_and_one_more_for_each_held_out_user(
    tmp_path: Path, measured: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    rows, stats = pairs_of(make_store(tmp_path, *measured))
    assert Counter(row["kind"] for row in rows if row["split"] == "train") == {"own": 25}
    assert stats["pairs"] == 25 and stats["pairs_by_kind"] == {"own": 25}
    assert stats["heldout_pairs"] == 10 and stats["heldout_pairs_by_kind"] == {"own": 5, "other": 5}
    assert stats["dropped"] == {} and stats["fewer_pairs"] == {}
    check_others(rows, measured[0])


def test_held_out_users_are_as_many_as_dpo_reads(
    tmp_path: Path, measured: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """The same ones whenever the stage runs, and training users all the same."""
    store = make_store(tmp_path, *measured)
    every, few, again = (
        [(row["split"], row["user_id"], row["chosen_token_ids"], row["rejected_token_ids"]) for row in rows]
        for rows in (pairs_of(store, f"policy.max_heldout_users={most}")[0] for most in (0, 3, 3))
    )
    held_out = {user for split, user, *_ in few if split == "valid"}
    assert len(held_out) == 3 and few == again
    assert few == [row for row in every if row[0] == "train" or row[1] in held_out]
    stats = pairs_of(store, "policy.max_heldout_users=3")[1]
    assert stats["heldout_pairs_by_kind"] == {"own": 3, "other": 3} and stats["dropped_heldout"] == {}


def check_others(rows: list[dict], rewards: np.ndarray) -> None:
    """Best against best of another user of the same split; tokens are [user, sample]."""
    for row in rows:
        if row["kind"] == "own":
            assert row["rejected_user_id"] == row["user_id"]
            continue
        user, other = row["user_id"], row["rejected_user_id"]
        assert user != other and (user < 25) == (other < 25), "of the other users of the split"
        assert row["prompt_token_ids"] == [user, 0]
        assert row["chosen_token_ids"] == [user, int(rewards[user].argmax())]
        assert row["rejected_token_ids"] == [[other, int(rewards[other].argmax())]]
        assert np.isnan(row["rejected_reward"][0]) and row["chosen_reward"] == rewards[user].max()


def test_several_pairs_per_user_with_a_share_of_others(
    tmp_path: Path, measured: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """Two of two pairs each with four texts: half of them, one per user, has another user's text instead of the second one."""
    store = make_store(tmp_path, *measured)
    several = ["pair.rule=top_vs_bottom", "pair.pairs_per_user=2"]
    own, stats = pairs_of(store, *several)
    assert stats["pairs"] == 50 and stats["heldout_pairs"] == 15
    assert [(row["user_id"], row["pair_id"]) for row in own[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    rows, stats = pairs_of(store, *several, "pair.others_share=0.5")
    assert stats["pairs_by_kind"] == {"own": 25, "other": 25}
    assert stats["heldout_pairs_by_kind"] == {"own": 10, "other": 5}
    check_others(rows, measured[0])
    first = {row["user_id"]: row for row in own if row["pair_id"] == 0}
    assert all(first[row["user_id"]] == row for row in rows if row["pair_id"] == 0), "the clearest stays"
    again, _ = pairs_of(store, *several, "pair.others_share=0.5")
    assert str(again) == str(rows), "drawn by seed"
    rows, stats = pairs_of(store, *several, "pair.others_share=1")
    assert stats["pairs_by_kind"] == {"other": 50}
    twice = [row["rejected_user_id"] for row in rows if row["user_id"] == 3]
    assert len(set(twice)) == 2, "no text twice"


def test_a_share_holds_over_all_users(
    tmp_path: Path, measured: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    _, stats = pairs_of(make_store(tmp_path, *measured), "pair.others_share=0.4")
    assert stats["pairs"] == 25 and 4 <= stats["pairs_by_kind"]["other"] <= 16


def test_hard_others_are_those_with_like_tastes(
    tmp_path: Path, measured: tuple[np.ndarray, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users lie on a circle in the order of their ids: with 24 candidates one is left out, and .9 leaves the next two."""
    angles = 2 * np.pi * np.arange(NUM_USERS) / 200
    tastes = dict(enumerate(np.stack([np.cos(angles), np.sin(angles)], axis=1)))
    monkeypatch.setattr(pair, "_tastes", lambda *_: tastes)
    changes = ["pair.others_share=1", "pair.others_hardness=0.9"]
    rows, _ = pairs_of(make_store(tmp_path, *measured), *changes)
    check_others(rows, measured[0])
    far = [abs(row["user_id"] - row["rejected_user_id"]) for row in rows if row["split"] == "train"]
    assert len(far) == 25 and max(far) <= 4


def test_pairs_that_luck_explains_are_left_out(
    tmp_path: Path, measured: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """Against the definition: margin at least 2 standard errors of a difference, sqrt(2) times the pooled noise over sqrt(n)."""
    rewards, errors, num_lists = measured
    noise = list_noise(errors, num_lists)
    clear = np.ptp(rewards, axis=1) >= 2 * noise * np.sqrt(2 / num_lists)
    rows, stats = pairs_of(make_store(tmp_path, *measured), "pair.min_std_errors=2")
    assert {row["user_id"] for row in rows} == set(np.flatnonzero(clear).tolist())
    assert 0 < clear.sum() < NUM_USERS
    assert stats["dropped"] == {"below_min_std_errors": int((~clear[:25]).sum())}


def test_nobody_to_compare_with_is_a_reason(
    tmp_path: Path, measured: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """User 0 has a plain reward and no personal one; its text is rejected under nobody's prompt either."""
    rewards = measured[0].copy()
    rewards[0] = np.nan
    rows, stats = pairs_of(make_store(tmp_path, rewards, *measured[1:]), "pair.others_share=1")
    assert stats["dropped"] == {"nobody_to_compare_with": 1}
    assert 0 not in {row["rejected_user_id"] for row in rows}


def test_pairs_of_earlier_rounds_are_kept_beside_the_rounds_own(
    tmp_path: Path, measured: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """Those of training users, with their round; held-out users have the last round's alone."""
    store = make_store(tmp_path, *measured)
    keep = "run.keep_pairs=true"
    first, stats = pairs_of(store, keep)
    assert stats["earlier_pairs"] == 0
    for name in ("generations", "scores"):
        store.path(name, 2).parent.mkdir(exist_ok=True)
        shutil.copytree(store.path(name, 1), store.path(name, 2))
    outcome = pair.run(load_config(DEMO, [keep]), store, 2)
    store.finish(Manifest("pairs", "", outcome.rows_out), 2)
    rows = store.read("pairs", 2).to_pylist()
    trained = [row for row in first if row["split"] == "train"]
    assert len(rows) == outcome.rows_out == len(first) + len(trained)
    assert outcome.stats["earlier_pairs"] == len(trained) > 0
    assert [row for row in rows if row["round"] == 1] == trained
    outcome = pair.run(load_config(DEMO, []), store, 2)
    assert outcome.rows_out == len(first)


def test_pairs_of_the_first_texts_alone(
    tmp_path: Path, measured: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """As if a user had no more than two texts: best and worst, the best that others reject, and how far rewards are pulled."""
    store = make_store(tmp_path, *measured)
    rewards, errors, num_lists = measured
    rows, _ = pairs_of(store, "pair.first_samples=2", "pair.others_share=1")
    check_others(rows, rewards[:, :2])
    own, stats = pairs_of(store, "pair.first_samples=2")
    assert stats["pairs_by_kind"] == {"own": 25}
    for row in own:
        if row["kind"] == "own":
            user = row["user_id"]
            assert row["chosen_token_ids"] == [user, int(rewards[user, :2].argmax())]
            assert row["rejected_token_ids"] == [[user, int(rewards[user, :2].argmin())]]
    shrunk, _ = shrink(rewards[:, :2], list_noise(errors, num_lists) / np.sqrt(num_lists))
    rows, _ = pairs_of(store, "pair.first_samples=2", "pair.shrinkage=true", "pair.min_margin=0.5")
    kept = {row["user_id"] for row in rows if row["kind"] == "own"}
    assert kept == set(np.flatnonzero(np.ptp(shrunk, axis=1) >= 0.5).tolist()) and 0 < len(kept) < 30


def test_random_pairs_are_drawn_by_user_and_seed(
    tmp_path: Path, measured: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """The same again, others by another seed, and each user's by a draw of its own."""
    store = make_store(tmp_path, *measured)
    first, again, other = (
        [
            (row["chosen_token_ids"][1], row["rejected_token_ids"][0][1])
            for row in rows
            if row["kind"] == "own"
        ]
        for rows in (pairs_of(store, "pair.rule=random", f"run.seed={seed}")[0] for seed in (0, 0, 1))
    )
    assert first == again and first != other and len(first) == 30
    assert len(set(first)) > 6, "of 12 ordered pairs of four texts"


def test_a_test_user_with_texts_is_an_error(
    tmp_path: Path, measured: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """Nobody who is tested may be trained on."""
    store = make_store(tmp_path, *measured)
    users = store.read("users")
    splits = users["split"].to_pylist()
    splits[7] = "test"
    store.start("users")
    store.write("users", users.set_column(users.schema.get_field_index("split"), "split", pa.array(splits)))
    store.finish(Manifest("users", "", NUM_USERS))
    with pytest.raises(ValueError, match="user 7 has texts"):
        pair.run(load_config(DEMO, []), store, 1)
