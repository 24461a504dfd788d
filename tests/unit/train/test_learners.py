"""What best-of-N and GRPO make of scored texts, and what they leave out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dpo4rec_ray.config import Config, load_config
from dpo4rec_ray.core.policy_gradient import advantages
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store.artifacts import RunDir, write_part
from dpo4rec_ray.train.grpo import same_reference
from dpo4rec_ray.train.learners import LEARNERS
from dpo4rec_ray.train.scored_texts import ARTIFACTS, AllTexts
from tests.conftest import DEMO
from tests.scored_run import NUM_SAMPLES, NUM_USERS, make_store

VALID = range(NUM_USERS - 5, NUM_USERS)
UNKNOWN, SAME = 3, 7  # users: without a reward, and with texts that are all worth the same


def config_of(objective: str, *changes: str) -> Config:
    return load_config(DEMO, [f"policy.objective={objective}", *changes])


@pytest.fixture
def rewards() -> np.ndarray:
    found = np.random.default_rng(0).normal(size=(NUM_USERS, NUM_SAMPLES)).astype(np.float32)
    found[UNKNOWN, 1] = np.nan
    found[SAME] = 0.5
    return found


@pytest.fixture
def store(tmp_path: Path, rewards: np.ndarray) -> RunDir:
    return make_store(tmp_path, rewards, np.ones(NUM_USERS, np.float32), np.full(NUM_USERS, 3), longer=True)


def text(user: int, sample: int) -> list[int]:
    return [user, sample, *[5] * sample]


def material(
    config: Config,
    store: RunDir,
    reference: str | None = None,
    *,
    sampler: str | None = None,
    moved: bool = False,
) -> Any:
    objective = config.policy.objective_of(1)
    task: Any = SimpleNamespace(
        config=config,
        store=store,
        round_id=1,
        reference=reference,
        sampler=sampler,
        moved=moved,
        objective=objective,
    )
    return LEARNERS[objective].material(task)


def test_every_user_with_rewards_is_in_its_split(store: RunDir) -> None:
    found = material(config_of("grpo"), store)
    first = [row["completions"][0][0] for row in found.heldout["users"]]
    assert first == list(VALID)
    trained = [row["completions"][0][0] for row in found.training]
    assert trained == [user for user in range(NUM_USERS - 5) if user not in (UNKNOWN, SAME)]
    for row in found.training:
        user = row["prompt_token_ids"][0]
        assert row["completions"] == [text(user, sample) for sample in range(NUM_SAMPLES)]


def test_held_out_users_are_bounded(store: RunDir) -> None:
    found = material(config_of("grpo", "policy.max_heldout_users=2"), store)
    users = {row["completions"][0][0] for row in found.heldout["users"]}
    assert len(users) == found.counts["valid"] == 2 and users <= set(VALID)


def test_grpo_reads_all_texts_of_users_whose_texts_differ(store: RunDir, rewards: np.ndarray) -> None:
    found = material(config_of("grpo"), store)
    assert (found.counts["train"], found.counts["train_same"], found.counts["valid"]) == (23, 1, 5)
    row = next(row for row in found.training if row["completions"][0][0] == 0)
    expected = advantages(rewards[0], "std")
    assert expected is not None
    np.testing.assert_allclose(row["advantages"], expected)
    assert found.lengths.tolist() == [2 + 2 * NUM_SAMPLES + 6] * 23 and found.trained == {"users": 23}


def test_grpo_takes_the_reference_of_its_user(store: RunDir, tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    for part, files in enumerate(zip(*(store.files(name, 1) for name in ARTIFACTS), strict=True)):
        users, groups = AllTexts().read(files)
        logps = [[[-float(token) for token in one] for one in group.completions] for group in groups]
        write_part(str(tmp_path / "reference"), "token_logps", AllTexts().table(users, logps), part)
    found = material(config_of("grpo"), store, str(tmp_path / "reference"))
    for row in found.training:
        assert row["sampler_logps"] == [[-float(token) for token in one] for one in row["completions"]]


def test_grpo_may_take_the_engines_own_log_probabilities(store: RunDir) -> None:
    """As the sampler's alone, or beside those that the trainer computes."""
    kept = ("generate.token_logps=true", "generate.top_p=1")
    for sampler, name in (("engine", "sampler_logps"), ("corrected", "engine_logps")):
        for row in material(config_of("grpo", *kept, f"grpo.sampler={sampler}"), store).training:
            assert set(row) - {"prompt_token_ids", "completions", "advantages"} == {name}
            for one, logps in zip(row["completions"], row[name], strict=True):
                np.testing.assert_allclose(logps, [-0.1 * token for token in one], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "moved", "same", "stored"),
    [
        ([], False, True, (True, False)),
        ([], True, False, (True, True)),
        (["grpo.kl_weight=0"], False, True, (True, False)),
        (["grpo.kl_weight=0"], True, False, (False, True)),
        (["policy.reference=lora_off"], False, True, (False, False)),
        (["policy.reference=lora_off"], True, False, (False, True)),
        (["grpo.sampler=engine"], False, False, (True, False)),
        (["grpo.sampler=engine"], True, False, (True, False)),
        (["grpo.sampler=engine", "grpo.kl_weight=0"], False, False, (False, False)),
    ],
)
def test_what_grpo_computes_before_it_trains(
    changes: list[str], moved: bool, same: bool, stored: tuple[bool, bool]
) -> None:
    config = config_of("grpo", "generate.token_logps=true", "generate.top_p=1", *changes)
    assert same_reference(config, moved) == same
    assert LEARNERS["grpo"].stored(config, moved) == stored


def test_grpo_keeps_reference_and_sampler_apart(store: RunDir, tmp_path: Path) -> None:
    for name, factor in (("reference", -1.0), ("sampler", -2.0)):
        (tmp_path / name).mkdir()
        for part, files in enumerate(zip(*(store.files(one, 1) for one in ARTIFACTS), strict=True)):
            users, groups = AllTexts().read(files)
            logps = [[[factor * token for token in one] for one in group.completions] for group in groups]
            write_part(str(tmp_path / name), "token_logps", AllTexts().table(users, logps), part)
    folders = (str(tmp_path / "reference"), str(tmp_path / "sampler"))
    for row in material(config_of("grpo"), store, folders[0], sampler=folders[1], moved=True).training:
        assert row["reference_logps"] == [[-1.0 * token for token in one] for one in row["completions"]]
        assert row["sampler_logps"] == [[-2.0 * token for token in one] for one in row["completions"]]


def test_best_of_n_reads_the_best_texts(store: RunDir, rewards: np.ndarray) -> None:
    found = material(config_of("best_of_n", "best_of_n.top=2"), store)
    assert (found.counts["train"], found.counts["train_without"]) == (23, 1)
    for row in found.training:
        user = row["completions"][0][0]
        order = np.argsort(-rewards[user])
        best = [place for place in order[:2] if rewards[user][place] > rewards[user].mean()]
        assert row["completions"] == [text(user, place) for place in best]
        assert row["weights"] == [1 / len(best)] * len(best)


def limited(config: Config, max_length: int) -> Config:
    return config.model_copy(update={"policy": config.policy.model_copy(update={"max_length": max_length})})


def test_a_text_that_is_too_long_is_no_part_of_its_group(
    store: RunDir, rewards: np.ndarray, tmp_path: Path
) -> None:
    """Prompts have two tokens, texts two to five: of four the last falls out, with its reward and its log-probabilities."""
    (tmp_path / "reference").mkdir()
    for part, files in enumerate(zip(*(store.files(name, 1) for name in ARTIFACTS), strict=True)):
        users, groups = AllTexts().read(files)
        logps = [[[-float(token) for token in one] for one in group.completions] for group in groups]
        write_part(str(tmp_path / "reference"), "token_logps", AllTexts().table(users, logps), part)
    found = material(limited(config_of("grpo"), 6), store, str(tmp_path / "reference"))
    assert found.counts["train_too_long"] == 24
    for row in found.training:
        user = row["prompt_token_ids"][0]
        assert row["completions"] == [text(user, sample) for sample in range(3)]
        assert row["sampler_logps"] == [[-float(token) for token in one] for one in row["completions"]]
        np.testing.assert_allclose(row["advantages"], advantages(rewards[user][:3], "std"))


@pytest.mark.parametrize("objective", ["grpo", "best_of_n"])
def test_where_no_text_fits_the_run_stops(store: RunDir, objective: str) -> None:
    with pytest.raises(UserError, match="'train_too_long': 96"):
        material(limited(config_of(objective), 3), store)


@pytest.mark.parametrize("objective", ["grpo", "best_of_n"])
def test_rewards_that_are_all_the_same_are_refused(tmp_path: Path, objective: str) -> None:
    same = np.zeros((NUM_USERS, NUM_SAMPLES), np.float32)
    store = make_store(tmp_path, same, np.ones(NUM_USERS, np.float32), np.full(NUM_USERS, 3))
    with pytest.raises(UserError, match="round 1: no training user"):
        material(config_of(objective), store)


def test_a_part_of_other_users_is_refused(store: RunDir) -> None:
    scores, generations = (store.files(name, 1) for name in ARTIFACTS)
    with pytest.raises(ValueError, match="different users"):
        AllTexts().read([scores[1], generations[0]])
