"""Promote, rollback, split and shadow: by one process and by several, with sound and with broken versions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import dpo4rec_ray.serving.publish as publishing
from dpo4rec_ray.config import read_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving.registry import KEPT, ROUTING_FILE, Registry, Routing
from dpo4rec_ray.serving.version_files import VersionCard, read_card
from dpo4rec_ray.serving.version_manager import VersionManager
from dpo4rec_ray.store.artifacts import RunDir
from tests.conftest import ROOT
from tests.serving_world import MODELS

FIRST = Routing(current="v1", number=1)


def test_nobody_answers_in_a_new_registry(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "new")
    assert registry.routing() == Routing() and registry.cards() == [] and not registry.root.exists()
    with pytest.raises(UserError, match="no version before"):
        registry.rollback()
    with pytest.raises(UserError, match="no version is promoted, so there is no version before it"):
        registry.rollback()
    with pytest.raises(UserError, match=r"no published version 'v1'; there is none; publish a run first"):
        registry.promote("v1")


def test_promote_and_roll_back(registry: Registry) -> None:
    assert registry.promote("v1") == registry.routing() == FIRST, "it answers already"
    assert registry.promote("v2") == Routing("v2", ("v1",), number=2)
    assert registry.promote("v3") == Routing("v3", ("v1", "v2"), number=3)
    registry.split("v1", 25)
    assert registry.shadow("v2") == Routing("v3", ("v1", "v2"), "v1", 25.0, "v2", number=5)
    assert registry.routing().versions == ("v3", "v1", "v2")
    assert registry.rollback() == Routing("v2", ("v1",), number=6), "split and shadow end"
    assert registry.rollback() == Routing("v1", number=7)
    with pytest.raises(UserError, match="no version before 'v1'"):
        registry.rollback()
    assert registry.routing() == Routing("v1", number=7)


def test_as_many_versions_are_kept_as_can_be_rolled_back_through(registry: Registry) -> None:
    for number in range(KEPT + 3):
        registry.promote(("v2", "v1")[number % 2])
    assert len(registry.routing().previous) == KEPT


def test_split_and_shadow_end(registry: Registry) -> None:
    registry.split("v2", 10)
    assert registry.split("v2", 0) == replace(FIRST, number=3)
    registry.shadow("v2")
    assert registry.shadow("") == replace(FIRST, number=5)


@pytest.mark.parametrize("percent", [-0.1, 100.1, float("nan"), float("inf")])
def test_percent_is_a_percentage(registry: Registry, percent: float) -> None:
    with pytest.raises(UserError, match="outside 0 to 100"):
        registry.split("v2", percent)
    assert registry.routing() == FIRST


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../v1", "a/b", "/etc", ".hidden", "-x", "a" * 65, "a\0b", "a\n", "é", "v1/", " v1"],
)
def test_a_name_cannot_leave_the_folder(registry: Registry, name: str) -> None:
    for call in (registry.folder, registry.promote, lambda one: registry.split(one, 5)):
        with pytest.raises(UserError, match="use letters, digits"):
            call(name)
    if name:
        with pytest.raises(UserError, match="use letters, digits"):
            registry.shadow(name)
    assert registry.routing() == FIRST


def test_a_version_that_is_not_there_is_refused(registry: Registry) -> None:
    for call in (registry.promote, registry.shadow, lambda one: registry.split(one, 5)):
        with pytest.raises(
            UserError, match=r"no published version 'v9'; there are: .*\bv1, .*\bv2, "
        ) as error:
            call("v9")
        assert "Errno" not in str(error.value)
    assert registry.routing() == FIRST


def test_a_version_that_answers_otherwise_is_refused(registry: Registry) -> None:
    """Every file can be read, but one tensor of weights has changed."""
    file = registry.folder("v2") / "reranker" / "model.safetensors"
    weights = load_file(file)
    name = "embedding.item_embedding.weight"  # counts in every list, whether texts are used or not
    weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, file)
    for call in (registry.promote, registry.shadow, lambda one: registry.split(one, 5)):
        with pytest.raises(UserError, match="gets other scores now than when the version was published"):
            call("v2")
    assert registry.routing() == FIRST


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"{",
            b"[]",
            b"null",
            b"7",
            b'"v1"',
            b"{}",
            b'{"current": "v1"}',
            b'{"previous": 3}',
            b"\xff\xfe",
        ),
        json.dumps(asdict(FIRST) | {"unheard": 1}).encode(),
    ],
)
def test_damaged_traffic_is_one_clear_mistake(registry: Registry, content: bytes) -> None:
    (registry.root / ROUTING_FILE).write_bytes(content)
    for call in (registry.routing, registry.rollback, lambda: registry.promote("v2")):
        with pytest.raises(UserError, match=ROUTING_FILE.replace(".", r"\.")):
            call()


@pytest.mark.parametrize(
    "change", [{"current": 7}, {"current": None}, {"percent": "many"}, {"number": "x"}, {"previous": [3]}]
)
def test_traffic_with_values_of_another_kind(registry: Registry, change: dict[str, object]) -> None:
    (registry.root / ROUTING_FILE).write_text(json.dumps(asdict(FIRST) | change), encoding="utf-8")
    with pytest.raises(UserError, match=r"traffic\.json"):
        registry.routing()


def test_a_rollback_to_what_is_not_there_is_refused(registry: Registry) -> None:
    """Else no replica that starts afterwards finds a version that it can load."""
    registry.promote("v2")
    shutil.rmtree(registry.folder("v1"))
    before = registry.routing()
    with pytest.raises(UserError, match="no published version 'v1'"):
        registry.rollback()
    assert registry.routing() == before
    assert VersionManager(registry).loaded.routing.current == "v2"


def test_of_two_publishers_of_a_name_one_publishes(
    registry: Registry, served_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, target = read_config(served_run.root), registry.folder("v9")
    inside, go_on = threading.Event(), threading.Event()
    real = publishing.write_card

    def slow(folder: Path, card: VersionCard) -> None:
        inside.set()
        assert go_on.wait(60)
        real(folder, card)

    monkeypatch.setattr(publishing, "write_card", slow)
    outcomes: dict[str, str] = {}

    def publish(model: str) -> None:
        try:
            publishing.publish(config, served_run, target, "v9", model)
            outcomes[model] = "published"
        except UserError as error:
            outcomes[model] = str(error)

    first = threading.Thread(target=publish, args=(MODELS["v1"],))
    second = threading.Thread(target=publish, args=(MODELS["v2"],))
    first.start()
    assert inside.wait(60)
    second.start()
    time.sleep(1)
    assert outcomes == {}
    go_on.set()
    for thread in (first, second):
        thread.join(60)
    assert outcomes[MODELS["v1"]] == "published" and "versions never change" in outcomes[MODELS["v2"]]
    assert read_card(target).model == MODELS["v1"]


def test_cards_are_those_of_complete_versions(registry: Registry) -> None:
    (registry.folder("v2") / "version.json").unlink()
    (registry.root / "versions" / ".v9.tmp77").mkdir()
    (registry.root / "versions" / "stray").write_text("", encoding="utf-8")
    assert {card.version for card in registry.cards()} == {"v1", "v3", "mir"}


def python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def test_processes_that_promote_at_once(registry: Registry) -> None:
    """Every change counts once, none is lost, and a reader never sees a mixture of two states."""
    code = (
        "import sys; from dpo4rec_ray.serving.registry import Registry\n"
        "registry = Registry(sys.argv[1])\n"
        "for number in range(3): registry.promote(sys.argv[2]); registry.split('v1', int(sys.argv[3]) + number)"
    )
    started = [
        python(code, str(registry.root), version, share) for version, share in (("v2", "10"), ("v3", "50"))
    ]
    numbers = []
    while any(process.poll() is None for process in started):
        numbers.append(registry.routing().number)
        time.sleep(0.002)
    assert [process.returncode for process in started] == [0, 0]
    last = registry.routing()
    assert numbers == sorted(numbers)
    # Six splits that all differ from the one before, and at least the two first promotions.
    assert 1 + 6 + 2 <= last.number <= 1 + 12 and last.current in ("v2", "v3") and last.percent in (12, 52)
    assert len(last.previous) == last.number - 1 - 6


def test_a_killed_publish_leaves_nothing(registry: Registry, served_run: RunDir) -> None:
    """A publish is killed while it writes, then repeated."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "import dpo4rec_ray.serving.publish as stage; from dpo4rec_ray.store.artifacts import RunDir\n"
        "from dpo4rec_ray.config import read_config\n"
        "if sys.argv[3] == 'kill': stage.write_card = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run = RunDir(sys.argv[1]); stage.publish(read_config(run.root), run, Path(sys.argv[2]), 'v9')"
    )
    before = registry.cards()
    killed = python(code, str(served_run.root), str(registry.folder("v9")), "kill")
    assert killed.wait() == -signal.SIGKILL
    assert registry.cards() == before and not registry.folder("v9").exists()
    with pytest.raises(UserError, match="no published version"):
        registry.promote("v9")
    assert python(code, str(served_run.root), str(registry.folder("v9")), "").wait() == 0
    assert registry.promote("v9").current == "v9"
    expected = np.load(registry.folder("v9") / "user_keys.npy")
    np.testing.assert_array_equal(expected, np.load(registry.folder("v1") / "user_keys.npy"))
