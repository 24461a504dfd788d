"""DPO workers killed at random steps, again and again: the weights at the end are those of a run that nobody disturbed."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import psutil
import pytest

from tests.conftest import Finished
from tests.integration.test_dpo import (
    ONE,
    TWO,
    assert_same_weights,
    copied,
    figures,
    start,
    steps_done,
    train,
    wait_for_steps,
    weights,
    workers_of,
)

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

KILLS = 5
LONG = ["dpo.epochs=20", "dpo.max_failures=10", "dpo.checkpoint_every=5"]


@pytest.mark.parametrize("workers", [[*ONE], [*TWO, "dpo.zero_stage=2"]], ids=["one", "two-zero2"])
def test_killed_workers_change_nothing(tiny_run: Finished, tmp_path: Path, workers: list[str]) -> None:
    (tmp_path / "undisturbed").mkdir()
    undisturbed = train(tiny_run, tmp_path / "undisturbed", *workers, *LONG)
    assert undisturbed.code == 0, undisturbed.stderr
    total = figures(undisturbed)["steps"]
    rng = random.Random(1)
    moments = sorted(rng.sample(range(6, total - 10), KILLS))
    folder = tmp_path / "disturbed"
    folder.mkdir()
    copied(tiny_run, folder)
    process = start(folder, *workers, *LONG)
    killed: list[int] = []
    for moment in moments:
        wait_for_steps(process, folder, moment)
        victims = workers_of(process)
        assert victims
        killed.append(steps_done(folder))
        try:
            rng.choice(victims).send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pytest.fail("the worker had ended by itself")
        wait_for_fewer(process, folder, killed[-1], total)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    done = Finished(folder / "run", 0, output, "")
    continued = figures(done)["continued_after"]
    print(f"{total} steps, killed after {killed}, continued after {continued}")
    assert len(continued) == KILLS
    assert_same_weights(weights(done), weights(undisturbed), atol=1e-6)


def wait_for_fewer(process: object, folder: Path, before: int, total: int) -> None:
    """Until the new workers have begun: the lines beyond the checkpoint are gone, or there are more."""
    import time

    deadline = time.monotonic() + 300
    while steps_done(folder) == before and before < total:
        assert time.monotonic() < deadline
        time.sleep(0.05)
