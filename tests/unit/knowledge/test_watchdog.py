"""Processes that hang in different ways; the watchdog is the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

HEAD = """
import sys, time, subprocess, signal, os
from pathlib import Path
from dpo4rec_ray.knowledge.watchdog import Watchdog
watchdog = Watchdog(1.0, Path(sys.argv[1]))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
"""
# This holds the interpreter's lock: no thread of this process can run.
HOLDS_THE_LOCK = "watchdog.alive(); sum(range(10**12))"
STOPS = "watchdog.alive(); os.kill(os.getpid(), signal.SIGSTOP)"
WORKS = "for _ in range(30):\n    watchdog.alive(); time.sleep(0.1)\n"
DIES = "for _ in range(15):\n    watchdog.alive(); time.sleep(0.1)\nos.kill(os.getpid(), signal.SIGKILL)"
WAITS = "watchdog.alive(); watchdog.idle(); time.sleep(3)"


def run(body: str, note: Path, timeout_s: float = 30) -> tuple[int, psutil.Process]:
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + body, str(note)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    return process.wait(timeout=timeout_s), child


def ended(process: psutil.Process) -> bool:
    """Whether it ends within 15 seconds; a zombie has ended."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.Error:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("body", [HOLDS_THE_LOCK, STOPS], ids=["holds the lock", "stopped"])
def test_a_hung_process_is_killed_with_its_children(tmp_path: Path, body: str) -> None:
    code, child = run(body, tmp_path / "note")
    assert code == -signal.SIGKILL
    assert (tmp_path / "note").read_text() == "no new token for 1 s"
    assert ended(child)


def test_what_a_dead_process_leaves_behind_is_ended_too(tmp_path: Path) -> None:
    code, child = run(DIES, tmp_path / "note")
    assert code == -signal.SIGKILL
    assert not (tmp_path / "note").exists(), "it did not hang"
    assert ended(child)


@pytest.mark.parametrize("body", [WORKS, WAITS], ids=["works", "idle"])
def test_a_healthy_process_is_left_alone(tmp_path: Path, body: str) -> None:
    code, child = run(body, tmp_path / "note")
    child.kill()
    assert code == 0
    assert not (tmp_path / "note").exists()


def test_progress_costs_nothing_and_a_dead_watchdog_does_not_matter(tmp_path: Path) -> None:
    from dpo4rec_ray.knowledge.watchdog import Watchdog

    watchdog = Watchdog(60)
    began = time.monotonic()
    for _ in range(10_000):
        watchdog.alive()
    assert time.monotonic() - began < 1
    os.kill(watchdog._process.pid, signal.SIGKILL)
    watchdog._process.wait()
    watchdog.idle()
    watchdog.alive()
    watchdog.close()
