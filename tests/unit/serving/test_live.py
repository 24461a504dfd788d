"""What a replica holds while its registry changes under it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving import live as live_module
from dpo4rec_ray.serving.live import Live, share_of
from dpo4rec_ray.serving.registry import TRAFFIC, Registry, Traffic

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


def write(registry: Registry, traffic: Traffic) -> None:
    """By hand: past the check of promote."""
    (registry.root / TRAFFIC).write_text(json.dumps(asdict(traffic)), encoding="utf-8")


def answers(live: Live, user_id: str = "", model: str | None = None) -> str:
    return live.ranker(user_id, model).version.card.version


def test_nothing_is_promoted(registry: Registry) -> None:
    (registry.root / TRAFFIC).unlink()
    with pytest.raises(UserError, match="no version is promoted"):
        Live(registry)


def test_a_promoted_version_takes_over(registry: Registry) -> None:
    live = Live(registry)
    before = live.held
    assert not live.refresh() and live.held is before, "nothing has changed"
    registry.promote("v2")
    assert answers(live) == "v1", "not before it is looked at"
    assert live.refresh() and answers(live) == "v2"
    assert answers(live, model="v1") == "v1" and live.held.rankers["v1"] is before.rankers["v1"]
    registry.promote("v3")
    assert live.refresh() and set(live.held.rankers) == {"v3", "v2"}, "the one before stays, older ones go"
    registry.rollback()
    loaded = live.held.rankers["v2"]
    assert live.refresh() and live.held.rankers["v2"] is loaded, "nothing is loaded for a rollback"
    assert live.refused == ""


def test_a_model_that_is_not_loaded(registry: Registry) -> None:
    live = Live(registry)
    for name in ("v2", "../v1", "", "v1 "):
        if name:
            with pytest.raises(UserError, match="is not loaded; there are: v1"):
                live.ranker("somebody", name)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_version_is_refused(
    registry: Registry, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What answered goes on; when the version is mended, it takes over."""
    monkeypatch.setattr(live_module, "FIRST_WAIT_S", 0.0)
    live = Live(registry)
    moved = registry.folder("v2").rename(registry.root / "whole")
    shutil.copytree(moved, registry.folder("v2"))
    DAMAGES[damage](registry.folder("v2"))
    write(registry, Traffic("v2", ("v1",), number=2))
    for _ in range(2):
        assert not live.refresh()
        assert answers(live) == "v1" and "v2" in live.refused
    shutil.rmtree(registry.folder("v2"))
    moved.rename(registry.folder("v2"))
    assert live.refresh() and answers(live) == "v2" and live.refused == ""


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_start_with_a_broken_version_takes_the_one_before(registry: Registry, damage: str) -> None:
    DAMAGES[damage](registry.folder("v2"))
    write(registry, Traffic("v2", ("v3", "v1"), number=7))
    live = Live(registry)
    assert answers(live) == "v1" and "v2" in live.refused
    DAMAGES[damage](registry.folder("v1"))
    assert answers(Live(registry)) == "v3", "and so on"


def test_a_start_without_any_sound_version(registry: Registry) -> None:
    for name in ("v1", "v2"):
        cut(registry.folder(name) / "user_standard.npy")
    write(registry, Traffic("v2", ("v1",), number=2))
    with pytest.raises(UserError, match="v2"):
        Live(registry)


def test_broken_versions_that_answer_nobody_do_no_harm(registry: Registry) -> None:
    """The one before the current one is only kept for a rollback."""
    cut(registry.folder("v2") / "user_standard.npy")
    write(registry, Traffic("v1", ("v2",), number=2))
    live = Live(registry)
    assert set(live.held.rankers) == {"v1"} and live.refused == ""


def test_damaged_traffic_is_refused_until_it_is_mended(registry: Registry) -> None:
    live = Live(registry)
    (registry.root / TRAFFIC).write_bytes(b"{")
    assert not live.refresh() and answers(live) == "v1" and TRAFFIC in live.refused
    write(registry, Traffic("v2", number=2))
    assert live.refresh() and answers(live) == "v2" and live.refused == ""


def test_a_split_is_by_user_and_keeps_its_promise(registry: Registry) -> None:
    registry.split("v2", 30)
    live = Live(registry)
    users = [f"user {number}" for number in range(4000)]
    given = [answers(live, user) for user in users]
    assert given == [answers(live, user) for user in users], "the same version every time"
    assert 0.27 < given.count("v2") / len(users) < 0.33
    registry.split("v2", 60)
    live.refresh()
    wider = [answers(live, user) for user in users]
    assert all(now == "v2" for then, now in zip(given, wider, strict=True) if then == "v2"), (
        "nobody goes back"
    )
    assert {answers(live) for _ in range(200)} == {"v1", "v2"}, "without an id, by chance"
    assert answers(live, users[0], "v1") == "v1" and answers(live, users[0], "v2") == "v2"


@pytest.mark.parametrize(("percent", "only"), [(100, "v2"), (0, "v1")])
def test_a_split_of_all_or_none(registry: Registry, percent: float, only: str) -> None:
    registry.split("v2", percent)
    live = Live(registry)
    assert {answers(live, f"user {number}") for number in range(500)} == {only}


def test_splits_of_different_versions_part_users_differently() -> None:
    first = [share_of(f"user {number}", "v2") < 0.5 for number in range(2000)]
    second = [share_of(f"user {number}", "v3") < 0.5 for number in range(2000)]
    both = sum(one == other for one, other in zip(first, second, strict=True))
    assert 900 < both < 1100


def test_a_refused_version_is_not_loaded_all_the_time(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, loads = Live(registry), []
    monkeypatch.setattr(live_module, "check_version", lambda *_: loads.append(1) or broken())
    write(registry, Traffic("v2", ("v1",), number=2))
    for _ in range(20):
        assert not live.refresh()
    assert len(loads) == 1 and answers(live) == "v1"


def broken() -> None:
    raise UserError("broken")


@pytest.mark.parametrize("away", ["traffic", "folder"])
def test_a_registry_that_is_away_changes_nothing(registry: Registry, away: str) -> None:
    live = Live(registry)
    if away == "traffic":
        (registry.root / TRAFFIC).rename(registry.root / "kept")
    else:
        registry.root.rename(registry.root.with_name("kept"))
    assert not live.refresh() and answers(live) == "v1" and live.refused
    if away == "traffic":
        (registry.root / "kept").rename(registry.root / TRAFFIC)
    else:
        registry.root.with_name("kept").rename(registry.root)
    assert not live.refresh() and live.refused == ""


def test_a_registry_that_begins_anew_is_followed(registry: Registry) -> None:
    """Its numbers begin at 1 again."""
    live = Live(registry)
    (registry.root / TRAFFIC).unlink()
    registry.promote("v2")
    assert live.refresh() and answers(live) == "v2"


def test_a_broken_shadow_does_not_move_a_replica_that_starts(registry: Registry) -> None:
    DAMAGES["no weights"](registry.folder("v3"))
    write(registry, Traffic("v2", ("v1",), shadow="v3", number=2))
    live = Live(registry)
    assert answers(live) == "v2" and "v3" in live.refused
