"""What a training keeps on disk, and what a continued one makes of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dpo4rec_ray.config.training import TrainerSection
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.store.metrics_file import MetricsFile, read_metrics
from dpo4rec_ray.train.launch import _storage, begin, remove_checkpoints
from dpo4rec_ray.train.loops import Looks


def test_steps_beyond_the_state_are_written_again(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path, rank=0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": step / 10})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # the worker died here
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    again = MetricsFile(tmp_path, rank=0)
    again.go_on_after(2)
    again.write({"step": 3, "loss": 0.5})
    assert [line["loss"] for line in read_metrics(tmp_path)] == [0.1, 0.2, 0.5]
    other = MetricsFile(tmp_path, rank=1)
    other.go_on_after(0)
    other.write({"step": 9})
    assert len(read_metrics(tmp_path)) == 3


def test_the_best_look_and_when_to_stop(tmp_path: Path) -> None:
    looks = Looks(tmp_path, rank=0)
    assert [looks.add(step, loss) for step, loss in ((1, 0.7), (2, 0.6), (3, 0.65))] == [True, True, False]
    assert looks.since_best == 1 and not looks.stopped(2) and not looks.stopped(0)
    assert not looks.add(4, 0.61) and looks.stopped(2)
    continued = Looks(tmp_path, rank=1)
    assert continued.losses == {1: 0.7, 2: 0.6, 3: 0.65, 4: 0.61}
    assert continued.add(2, 0.6) and continued.losses == {1: 0.7, 2: 0.6}  # steps 3 and 4 are done again
    assert Looks(tmp_path, rank=1).losses[4] == 0.61  # another worker's look is not written


def test_without_held_out_pairs_the_last_policy_is_the_one() -> None:
    looks = Looks(Path("nowhere"), rank=1)
    assert looks.add(1, math.nan) and looks.add(2, math.nan)


@pytest.mark.parametrize("finished", [False, True])
def test_only_an_unfinished_training_of_the_same_work_is_continued(tmp_path: Path, finished: bool) -> None:
    store = RunDir(tmp_path)
    store.fingerprint = "fingerprint"
    folder = begin(store, "policy", 1)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    if finished:
        store.finish(Manifest("policy", "fingerprint", 1), 1)
    assert begin(store, "policy", 1) == folder
    assert (folder / "metrics.jsonl").exists() is not finished
    (folder / "metrics.jsonl").write_text("")
    store.fingerprint = "another fingerprint"
    begin(store, "policy", 1)
    assert not (folder / "metrics.jsonl").exists()


def test_a_training_that_begins_anew_has_checkpoints_of_its_own(tmp_path: Path) -> None:
    """Storage that runs share holds what a training with other settings left: it is not gone on from."""
    store, shared = RunDir(tmp_path / "run"), tmp_path / "shared"
    section = TrainerSection(storage_path=f"file://{shared}")
    places = []
    for fingerprint in ("one", "one", "another"):
        store.fingerprint = fingerprint
        places.append(_storage(section, begin(store, "policy", 1)))
        Path(places[-1].removeprefix("file://")).mkdir(parents=True, exist_ok=True)
    assert places[0] == places[1] != places[2]
    remove_checkpoints(section, store.path("policy", 1))
    assert [f"file://{place}" for place in shared.iterdir()] == places[:1]
    home = TrainerSection(storage_path="~/checkpoints")
    assert _storage(home, store.path("policy", 1)).startswith(str(Path.home().resolve() / "checkpoints"))
