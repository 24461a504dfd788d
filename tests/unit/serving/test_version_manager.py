"""The versions in memory while the registry changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving import version_manager
from dpo4rec_ray.serving.registry import ROUTING_FILE, Registry, Routing
from dpo4rec_ray.serving.version_manager import VersionManager, share_of

DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights cut off": lambda folder: cut(folder / "reranker" / "model.safetensors"),
    "no weights": lambda folder: (folder / "reranker" / "model.safetensors").unlink(),
    "vectors cut off": lambda folder: cut(folder / "user_standard.npy"),
    "item vectors cut off": lambda folder: cut(folder / "item_vectors.npy"),
    "card cut off": lambda folder: cut(folder / "reranker" / "reranker.json"),
    "nothing recorded": lambda folder: (folder / "recorded.json").unlink(),
    "not complete": lambda folder: (folder / "version.json").unlink(),
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def write(registry: Registry, routing: Routing) -> None:
    """Write traffic.json without the checks of promote."""
    (registry.root / ROUTING_FILE).write_text(json.dumps(asdict(routing)), encoding="utf-8")


def answers(manager: VersionManager, user_id: str = "", model: str | None = None) -> str:
    return manager.version_for(user_id, model).files.card.version


def test_nothing_is_promoted(registry: Registry) -> None:
    (registry.root / ROUTING_FILE).unlink()
    with pytest.raises(UserError, match="no version is promoted"):
        VersionManager(registry)


def test_a_promoted_version_takes_over(registry: Registry) -> None:
    manager = VersionManager(registry)
    before = manager.loaded
    assert not manager.refresh() and manager.loaded is before, "nothing has changed"
    registry.promote("v2")
    assert answers(manager) == "v1", "not before it is looked at"
    assert manager.refresh() and answers(manager) == "v2"
    assert answers(manager, model="v1") == "v1" and manager.loaded.versions["v1"] is before.versions["v1"]
    registry.promote("v3")
    assert manager.refresh() and set(manager.loaded.versions) == {"v3", "v2"}, (
        "the one before stays, older ones go"
    )
    registry.rollback()
    loaded = manager.loaded.versions["v2"]
    assert manager.refresh() and manager.loaded.versions["v2"] is loaded, "nothing is loaded for a rollback"
    assert manager.refused == ""


def test_a_model_that_is_not_loaded(registry: Registry) -> None:
    manager = VersionManager(registry)
    for name in ("v2", "../v1", "", "v1 "):
        if name:
            with pytest.raises(UserError, match="is not loaded; there are: v1"):
                manager.version_for("somebody", name)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_version_is_refused(
    registry: Registry, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old version still answers. When the new one is repaired, it is loaded."""
    monkeypatch.setattr(version_manager, "FIRST_WAIT_S", 0.0)
    manager = VersionManager(registry)
    moved = registry.folder("v2").rename(registry.root / "whole")
    shutil.copytree(moved, registry.folder("v2"))
    DAMAGES[damage](registry.folder("v2"))
    write(registry, Routing("v2", ("v1",), number=2))
    for _ in range(2):
        assert not manager.refresh()
        assert answers(manager) == "v1" and "v2" in manager.refused
    shutil.rmtree(registry.folder("v2"))
    moved.rename(registry.folder("v2"))
    assert manager.refresh() and answers(manager) == "v2" and manager.refused == ""


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_start_with_a_broken_version_takes_the_one_before(registry: Registry, damage: str) -> None:
    DAMAGES[damage](registry.folder("v2"))
    write(registry, Routing("v2", ("v3", "v1"), number=7))
    manager = VersionManager(registry)
    assert answers(manager) == "v1" and "v2" in manager.refused
    DAMAGES[damage](registry.folder("v1"))
    assert answers(VersionManager(registry)) == "v3", "and so on"


def test_a_start_without_any_sound_version(registry: Registry) -> None:
    for name in ("v1", "v2"):
        cut(registry.folder(name) / "user_standard.npy")
    write(registry, Routing("v2", ("v1",), number=2))
    with pytest.raises(UserError, match="v2"):
        VersionManager(registry)


def test_broken_versions_that_answer_nobody_do_no_harm(registry: Registry) -> None:
    """The version before the current one is only loaded for a rollback."""
    cut(registry.folder("v2") / "user_standard.npy")
    write(registry, Routing("v1", ("v2",), number=2))
    manager = VersionManager(registry)
    assert set(manager.loaded.versions) == {"v1"} and manager.refused == ""


def test_damaged_traffic_is_refused_until_it_is_mended(registry: Registry) -> None:
    manager = VersionManager(registry)
    (registry.root / ROUTING_FILE).write_bytes(b"{")
    assert not manager.refresh() and answers(manager) == "v1" and ROUTING_FILE in manager.refused
    write(registry, Routing("v2", number=2))
    assert manager.refresh() and answers(manager) == "v2" and manager.refused == ""


def test_a_split_is_by_user_and_keeps_its_promise(registry: Registry) -> None:
    registry.split("v2", 30)
    manager = VersionManager(registry)
    users = [f"user {number}" for number in range(4000)]
    given = [answers(manager, user) for user in users]
    assert given == [answers(manager, user) for user in users], "the same version every time"
    assert 0.27 < given.count("v2") / len(users) < 0.33
    registry.split("v2", 60)
    manager.refresh()
    wider = [answers(manager, user) for user in users]
    assert all(now == "v2" for then, now in zip(given, wider, strict=True) if then == "v2"), (
        "nobody goes back"
    )
    assert {answers(manager) for _ in range(200)} == {"v1", "v2"}, "without an id, by chance"
    assert answers(manager, users[0], "v1") == "v1" and answers(manager, users[0], "v2") == "v2"


@pytest.mark.parametrize(("percent", "only"), [(100, "v2"), (0, "v1")])
def test_a_split_of_all_or_none(registry: Registry, percent: float, only: str) -> None:
    registry.split("v2", percent)
    manager = VersionManager(registry)
    assert {answers(manager, f"user {number}") for number in range(500)} == {only}


def test_splits_of_different_versions_part_users_differently() -> None:
    first = [share_of(f"user {number}", "v2") < 0.5 for number in range(2000)]
    second = [share_of(f"user {number}", "v3") < 0.5 for number in range(2000)]
    both = sum(one == other for one, other in zip(first, second, strict=True))
    assert 900 < both < 1100


def test_a_refused_version_is_not_loaded_all_the_time(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, loads = VersionManager(registry), []
    monkeypatch.setattr(version_manager, "load_version", lambda *_: loads.append(1) or broken())
    write(registry, Routing("v2", ("v1",), number=2))
    for _ in range(20):
        assert not manager.refresh()
    assert len(loads) == 1 and answers(manager) == "v1"


def broken() -> None:
    raise UserError("broken")


@pytest.mark.parametrize("away", ["routing", "folder"])
def test_a_registry_that_is_away_changes_nothing(registry: Registry, away: str) -> None:
    manager = VersionManager(registry)
    if away == "routing":
        (registry.root / ROUTING_FILE).rename(registry.root / "kept")
    else:
        registry.root.rename(registry.root.with_name("kept"))
    assert not manager.refresh() and answers(manager) == "v1" and manager.refused
    if away == "routing":
        (registry.root / "kept").rename(registry.root / ROUTING_FILE)
    else:
        registry.root.with_name("kept").rename(registry.root)
    assert not manager.refresh() and manager.refused == ""


def test_a_registry_that_begins_anew_is_followed(registry: Registry) -> None:
    """The numbers of a new registry begin at 1 again."""
    manager = VersionManager(registry)
    (registry.root / ROUTING_FILE).unlink()
    registry.promote("v2")
    assert manager.refresh() and answers(manager) == "v2"


def test_a_broken_shadow_does_not_move_a_replica_that_starts(registry: Registry) -> None:
    DAMAGES["no weights"](registry.folder("v3"))
    write(registry, Routing("v2", ("v1",), shadow="v3", number=2))
    manager = VersionManager(registry)
    assert answers(manager) == "v2" and "v3" in manager.refused
