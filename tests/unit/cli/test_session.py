"""A command's Ray on one machine: its own token, which is left nowhere, and SIGTERM as an orderly end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

COMMAND = """
import sys, time, ray
from dpo4rec_ray.cli import session

def call():
    session.start_ray(False)
    print(len(session.os.environ["RAY_AUTH_TOKEN"]), flush=True)
    ray.get(ray.remote(num_cpus=1)(lambda: time.sleep(300)).remote())

sys.exit(session.guarded(call, False))
"""


@pytest.mark.ray
def test_sigterm_ends_with_a_line_and_no_token_stays(tmp_path: Path) -> None:
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RAY_") and name != "PYTHONPATH"
    }
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        env={**env, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "64\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert said.strip() == "stopped; the same command goes on from here"
    assert not (tmp_path / ".ray").exists()
