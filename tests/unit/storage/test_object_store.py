"""What a store that refuses, or is away, is to those who read and write. The server is real, with a proxy before it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from dpo4rec_ray.cli.mistakes import user_mistake
from dpo4rec_ray.serving.haproxy import free_ports
from dpo4rec_ray.storage import object_store
from dpo4rec_ray.storage.lease import lease
from dpo4rec_ray.storage.places import Place, create, place, write_text
from tests.conftest import ROOT, until
from tests.object_store import store_at

Tell = Callable[[str], object]
AWAY_S = 8.0  # longer than obstore's own ten retries take


@pytest.fixture
def flaky(s3: str, s3_address: str, tmp_path: Path) -> Iterator[tuple[Place, Tell]]:
    """A folder in a bucket, and what tells the proxy to fail."""
    [port], mode = free_ports(1), tmp_path / "mode"
    command = ["tests/flaky_proxy.py", "127.0.0.1", str(port), s3_address, str(mode)]
    proxy = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        until(lambda: answers(port), 20)
        with store_at(f"http://127.0.0.1:{port}"):
            yield place(s3), mode.write_text
    finally:
        proxy.kill()
        proxy.wait()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def test_a_store_that_is_away_is_waited_for(flaky: tuple[Place, Tell]) -> None:
    folder, tell = flaky
    write_text(folder / "a", "before")
    tell("503")
    back = threading.Timer(AWAY_S, tell, [""])
    back.start()
    write_text(folder / "a", "after")
    assert not back.is_alive(), "it was written while the store was away"
    assert (folder / "a").read_text() == "after"


def test_its_errors_are_those_of_any_storage(
    flaky: tuple[Place, Tell], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tell = flaky
    write_text(folder / "a", "text")
    object_store.S3.clear_instance_cache()
    monkeypatch.setitem(object_store.RETRIES, "retry_timeout", timedelta(milliseconds=300))
    folder = place(str(folder))
    tell("503")
    doings: dict[str, Callable[[], object]] = {
        "read": (folder / "a").read_bytes,
        "open": lambda: (folder / "a").open("rb").read(),
        "write": lambda: write_text(folder / "b", ""),
        "create": lambda: create(folder / "c", b""),
        "list": lambda: list(folder.iterdir()),
        "exists": (folder / "a").exists,
        "unlink": (folder / "a").unlink,
    }
    for name, do in doings.items():
        with pytest.raises(OSError, match="Error performing") as raised:
            do()
        assert raised.value.strerror and "\n" not in raised.value.strerror, name
        assert "store does not answer" in str(user_mistake(raised.value)), name
    tell("")
    assert (folder / "a").read_text() == "text"
    with pytest.raises(FileNotFoundError):
        (folder / "b").read_text()


def test_a_lease_outlives_a_store_that_is_away(
    flaky: tuple[Place, Tell], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another job would take the run over while this one goes on."""
    from dpo4rec_ray.storage import lease as module

    folder, tell = flaky
    object_store.S3.clear_instance_cache()
    monkeypatch.setitem(object_store.RETRIES, "retry_timeout", timedelta(milliseconds=100))
    monkeypatch.setattr(module, "BEAT_S", 0.2)
    lost: list[bool] = []
    with lease(place(str(folder)), lost=lambda: lost.append(True)):
        tell("503")
        threading.Event().wait(2)
        tell("")
        [file] = list((folder / module.FOLDER).iterdir())
        before = file.read_text()
        until(lambda: file.read_text() != before, 10)
    assert not lost and json.loads(file.read_text())["ended"]
