"""Whose training a folder holds, what its state keeps, and where its checkpoints are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpo4rec_ray.config.training import TrainerSection
from dpo4rec_ray.store.artifacts import Manifest, RunDir
from dpo4rec_ray.train.state import begin, checkpoint_storage, read_state, remove_checkpoints, update_state


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
    """Shared storage holds what a training with other settings left; that training is not continued."""
    store, shared = RunDir(tmp_path / "run"), tmp_path / "shared"
    section = TrainerSection(storage_path=f"file://{shared}")
    places = []
    for fingerprint in ("one", "one", "another"):
        store.fingerprint = fingerprint
        places.append(checkpoint_storage(section, begin(store, "policy", 1)))
        Path(places[-1].removeprefix("file://")).mkdir(parents=True, exist_ok=True)
    assert places[0] == places[1] != places[2]
    remove_checkpoints(section, store.path("policy", 1))
    assert [f"file://{place}" for place in shared.iterdir()] == places[:1]
    home = TrainerSection(storage_path="~/checkpoints")
    assert checkpoint_storage(home, store.path("policy", 1)).startswith(
        str(Path.home().resolve() / "checkpoints")
    )


def test_the_state_is_one_file_that_is_written_whole(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    first = update_state(tmp_path, fingerprint="fingerprint", continued_after=[3])
    (tmp_path / "training.tmp1").write_text('{"id": "')  # a writer died here
    assert read_state(tmp_path) == first
    second = update_state(tmp_path, refused="lower lr", result={"heldout_losses": {1: 0.7, 2: float("nan")}})
    assert (second.id, second.fingerprint, second.continued_after) == (first.id, "fingerprint", [3])
    found = read_state(tmp_path)
    assert found is not None and found.refused == "lower lr"
    assert found.result == {"heldout_losses": {"1": 0.7, "2": None}}
