"""Which round is kept, from the heldout tables of several rounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dpo4rec_ray.config import default_config
from dpo4rec_ray.config.recipe import RunSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.pipeline import rounds
from dpo4rec_ray.running import Runner, Selection
from dpo4rec_ray.stages.validate import _choice, best_round, rounds_have_peaked
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.store.final import final_policy
from dpo4rec_ray.store.schemas import HELDOUT_FIGURES


def add_round(
    store: RunDir,
    round_id: int,
    before: tuple[float, float],
    after: tuple[float, float],
    turns: int = 1,
    lucky: float = 0.0,
) -> dict:
    """A round whose 20 users all have these (reward, reading), as `validate` writes it; one has `lucky` more of both after it."""
    users = np.arange(20)
    columns = {
        f"{name}_{side}": np.zeros(20, np.float32) for name in HELDOUT_FIGURES for side in ("before", "after")
    }
    noise = np.linspace(-0.01, 0.01, 20)
    for side, (reward, reading) in (("before", before), ("after", after)):
        columns[f"reward_{side}"] = (reward + noise).astype(np.float32)
        columns[f"others_reward_{side}"] = columns[f"reward_{side}"] - np.float32(reading)
    columns["reward_after"][0] += lucky
    table = pa.table({"round": np.full(20, round_id, np.int32), "user_id": users, **columns})
    store.start("heldout", round_id)
    store.write("heldout", table, round_id)
    _, stats = _choice(RunSection(num_rounds=9, turns_per_round=turns), store, round_id, table)
    store.finish(Manifest("heldout", "", 20, stats=stats), round_id)
    return stats


def test_rounds_are_judged_against_the_best_one_before_them(tmp_path: Path) -> None:
    """Round 2 has more reward but reads less than round 1; round 3 has less reward than 2, more than 1, and reads as well."""
    store = RunDir(tmp_path)
    assert best_round(store, 0) == 0
    one = add_round(store, 1, (0.0, 0.1), (0.2, 0.2))
    assert (one["best_round"], one["choice"]["kept"], one["choice"]["against"]) == (1, True, 0)
    assert one["choice"]["reward"] == pytest.approx(0.2) and one["choice"]["reading"] == pytest.approx(0.1)
    two = add_round(store, 2, (0.2, 0.2), (0.5, 0.1))
    assert (two["best_round"], two["choice"]["kept"]) == (1, False)
    assert two["choice"]["reading_ci95"][1] < 0 < two["choice"]["reward_ci95"][0]
    assert rounds_have_peaked(RunSection(patience=1), store, 2) and not rounds_have_peaked(
        RunSection(patience=2), store, 2
    )
    three = add_round(store, 3, (0.5, 0.1), (0.3, 0.2))
    assert (three["best_round"], three["choice"]["against"]) == (3, 1)
    assert three["choice"]["reward"] == pytest.approx(0.1)  # against round 1's texts, not round 2's
    assert best_round(store, 3) == 3 and not rounds_have_peaked(RunSection(patience=1), store, 3)


def test_rounds_of_two_turns_are_judged_by_their_last_ones(tmp_path: Path) -> None:
    store, run = RunDir(tmp_path), RunSection(num_rounds=9, turns_per_round=2)
    one = add_round(store, 2, (0.0, 0.1), (0.2, 0.2), turns=2)
    assert (one["best_round"], one["choice"]["against"]) == (2, 0)
    assert not rounds_have_peaked(run, store, 2)
    two = add_round(store, 4, (0.2, 0.2), (0.1, 0.2), turns=2)
    assert (two["best_round"], two["choice"]["against"]) == (2, 2)
    assert two["choice"]["reward"] == pytest.approx(-0.1)
    assert rounds_have_peaked(run, store, 4)


def test_where_no_round_was_kept_the_first_rounds_texts_before_are_the_ones_to_beat(tmp_path: Path) -> None:
    store = RunDir(tmp_path)
    add_round(store, 2, (0.3, 0.1), (0.2, 0.1), turns=2)
    two = add_round(store, 4, (0.2, 0.1), (0.25, 0.1), turns=2)
    assert two["best_round"] == 0 and two["choice"]["reward"] == pytest.approx(-0.05)


def test_no_round_beats_the_base_llm(tmp_path: Path) -> None:
    """Every later round is compared with round 1's texts before training, not with its own before."""
    store = RunDir(tmp_path)
    add_round(store, 1, (0.3, 0.1), (0.2, 0.1))
    two = add_round(store, 2, (0.2, 0.1), (0.25, 0.1))
    assert two["best_round"] == 0 and two["choice"]["reward"] == pytest.approx(-0.05)
    assert rounds_have_peaked(RunSection(patience=2), store, 2)
    assert not rounds_have_peaked(RunSection(patience=1), store, 3), "round 3 was not validated yet"


def add_policy(store: RunDir, number: int) -> None:
    store.start("policy", number)
    store.finish(Manifest("policy", "", 1, stats={"reference": "base LLM"}), number)


def test_with_auto_a_worse_round_ends_the_run_and_the_one_before_is_promoted(tmp_path: Path) -> None:
    store, config = RunDir(tmp_path), default_config(["run.num_rounds=auto"])
    runner = Runner(config, store, Selection())
    runner.promote(0)
    assert final_policy(store) is None, "no round was validated"
    add_round(store, 1, (0.0, 0.1), (0.2, 0.2))
    add_policy(store, 1)
    assert not runner.peaked(1)
    add_round(store, 2, (0.2, 0.2), (0.1, 0.1))
    add_policy(store, 2)
    assert runner.peaked(2)
    runner.promote(2)
    found = final_policy(store)
    assert found and (found.round, found.policy, found.folder) == (1, 1, "rounds/01/policy")
    assert found.reference == "base LLM" and "best of 2 rounds" in found.why


def test_with_auto_a_round_that_is_better_by_chance_is_kept_and_is_the_last(tmp_path: Path) -> None:
    """With a number of rounds they go on. One user's reward rises, by which the mean does too."""
    store = RunDir(tmp_path)
    add_round(store, 1, (0.0, 0.1), (0.2, 0.2))
    add_round(store, 2, (0.2, 0.2), (0.2, 0.2), lucky=0.3)
    auto, three = RunSection(num_rounds="auto"), RunSection(num_rounds=3)
    assert best_round(store, 2) == 2
    assert "beyond chance" in rounds_have_peaked(auto, store, 2) and not rounds_have_peaked(three, store, 2)
    assert not rounds_have_peaked(RunSection(num_rounds="auto", patience=2), store, 2), "round 1 was better"
    assert not rounds_have_peaked(auto, store, 1)


def test_rounds_go_on_for_as_long_as_they_help_to_a_bound(tmp_path: Path) -> None:
    store, config = RunDir(tmp_path), default_config(["run.num_rounds=auto"])
    runner = Runner(config, store, Selection())
    for number in range(1, 11):
        rise = 0.1 * number
        add_round(store, number, (rise, rise), (rise + 0.1, rise + 0.1))
        assert not runner.peaked(number)
    assert list(rounds(config)) == list(range(1, 11))


def test_where_no_round_helps_the_base_llm_is_promoted(tmp_path: Path) -> None:
    store = RunDir(tmp_path)
    add_round(store, 1, (0.3, 0.1), (0.2, 0.1))
    add_policy(store, 1)
    Runner(default_config([]), store, Selection()).promote(1)
    found = final_policy(store)
    assert found and (found.round, found.policy, found.folder, found.reference) == (0, 0, "", "")
    assert "none of 1 round improved" in found.why


def test_a_recipe_that_trains_nothing_withdraws_the_card_of_one_that_did(tmp_path: Path) -> None:
    store = RunDir(tmp_path)
    add_round(store, 1, (0.0, 0.1), (0.2, 0.2))
    add_policy(store, 1)
    Runner(default_config([]), store, Selection()).promote(1)
    assert final_policy(store)
    untrained = default_config(["run.num_rounds=0"])
    Runner(untrained, store, Selection(only="prepare")).promote(0)
    assert final_policy(store), "a part of a run says nothing of its end"
    Runner(untrained, store, Selection()).promote(0)
    assert final_policy(store) is None


def test_a_part_of_a_run_promotes_nothing(tmp_path: Path) -> None:
    """The policy of an interrupted training has no manifest, and the figures may be of the one before it."""
    store = RunDir(tmp_path)
    add_round(store, 1, (0.0, 0.1), (0.2, 0.2))
    for selection in (Selection(only="prepare"), Selection(only="score", round_id=1)):
        Runner(default_config([]), store, selection).promote(1)
    assert final_policy(store) is None
    add_policy(store, 1)
    Runner(default_config([]), store, Selection(only="validate", round_id=1)).promote(1)
    assert final_policy(store)


def test_a_round_of_an_older_version_says_what_to_run(tmp_path: Path) -> None:
    store = RunDir(tmp_path)
    store.start("heldout", 1)
    store.finish(Manifest("heldout", "", 0, stats={"heldout_reward_after": 0.5}), 1)
    with pytest.raises(UserError, match="--from validate"):
        best_round(store, 1)
