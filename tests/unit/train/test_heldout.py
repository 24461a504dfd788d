"""Which policy is kept, when training stops, and what a continued training knows of earlier evaluations."""

from __future__ import annotations

import math
from pathlib import Path

from dpo4rec_ray.store.metrics_file import MetricsFile, read_metrics
from dpo4rec_ray.train.heldout import HELDOUT, HeldoutEvaluations, mixed


def restored(folder: Path) -> HeldoutEvaluations:
    found = HeldoutEvaluations()
    for line in read_metrics(folder):
        found.add(line["step"], line[HELDOUT])
    return found


def test_the_best_evaluation_and_when_to_stop(tmp_path: Path) -> None:
    evaluations, file = HeldoutEvaluations(), MetricsFile(tmp_path, rank=0)

    def add(step: int, loss: float) -> bool:
        best = evaluations.add(step, {"loss": loss})
        file.write({"step": step, HELDOUT: {"loss": loss}})
        return best

    assert [add(step, loss) for step, loss in ((1, 0.7), (2, 0.6), (3, 0.65))] == [True, True, False]
    assert evaluations.stopped(1) and not evaluations.stopped(2) and not evaluations.stopped(0)
    assert not add(4, 0.61) and evaluations.stopped(2)
    assert evaluations.kept == {"loss": 0.6}
    MetricsFile(tmp_path, rank=1).write(
        {"step": 5, HELDOUT: {"loss": 0.1}}
    )  # another worker's is not written
    assert restored(tmp_path).losses == {1: 0.7, 2: 0.6, 3: 0.65, 4: 0.61}
    file.go_on_after(1)
    continued = restored(tmp_path)
    assert continued.add(2, {"loss": 0.6}) and continued.losses == {1: 0.7, 2: 0.6}  # 3 and 4 are done again


def test_of_equal_losses_the_last_policy_is_kept_and_the_first_counts() -> None:
    evaluations = HeldoutEvaluations()
    assert [evaluations.add(step, {"loss": 0.5, "margin": step}) for step in (1, 2)] == [True, True]
    assert evaluations.kept["margin"] == 2
    assert evaluations.stopped(1) and not evaluations.stopped(2)


def test_without_held_out_pairs_the_last_policy_is_the_one() -> None:
    evaluations = HeldoutEvaluations()
    assert evaluations.add(1, {}) and evaluations.add(2, {})
    assert all(map(math.isnan, evaluations.losses.values()))
    assert not evaluations.stopped(1)


def test_kinds_weigh_as_in_training() -> None:
    """A quarter of the training pairs has another user's text: loss .75 * .4 + .25 * .8 = .5."""
    by_kind = {"own": {"loss": 0.4, "accuracy": 0.75}, "other": {"loss": 0.8, "accuracy": 0.25}}
    found = mixed(by_kind, {"own": 30, "other": 10})
    assert math.isclose(found["loss"], 0.5) and math.isclose(found["accuracy"], 0.625)
    assert (found["accuracy_own"], found["accuracy_other"]) == (0.75, 0.25)


def test_a_kind_that_is_not_trained_on_is_only_watched() -> None:
    by_kind = {"own": {"loss": 0.4, "accuracy": 0.75}, "other": {"loss": 0.8, "accuracy": 0.25}}
    found = mixed(by_kind, {"own": 30, "other": 0})
    assert found == {"loss": 0.4, "accuracy": 0.75, "accuracy_own": 0.75, "accuracy_other": 0.25}
    alone = mixed({"own": {}, "other": by_kind["other"]}, {"own": 30, "other": 0})
    assert alone == {"loss": 0.8, "accuracy": 0.25, "accuracy_other": 0.25}
    assert mixed({"own": {}, "other": {}}, {"own": 30}) == {}
