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
    start,
    stats,
    steps_done,
    train,
    wait_for_steps,
    weights,
    workers_of,
)

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

KILLS = 5
LONG = ["policy.epochs=20", "policy.max_failures=10", "policy.checkpoint_every=5"]


@pytest.mark.parametrize("workers", [[*ONE], [*TWO, "policy.zero_stage=2"]], ids=["one", "two-zero2"])
def test_killed_workers_change_nothing(tiny_run: Finished, tmp_path: Path, workers: list[str]) -> None:
    (tmp_path / "undisturbed").mkdir()
    undisturbed = train(tiny_run, tmp_path / "undisturbed", *workers, *LONG)
    assert undisturbed.code == 0, undisturbed.stderr
    total = stats(undisturbed)["steps"]
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
    continued = stats(done)["continued_after"]
    print(f"{total} steps, killed after {killed}, continued after {continued}")
    assert len(continued) == KILLS
    assert_same_weights(weights(done), weights(undisturbed), atol=1e-6)


def test_fewer_workers_after_a_lost_node(tiny_run: Finished, tmp_path: Path) -> None:
    """Two nodes with a worker each; one goes without a word. The other goes on alone, to the weights of both."""
    from ray.cluster_utils import Cluster

    # one worker adds up in another order than two: steps that do not blow rounding up
    recipe = [*TWO, *LONG, "policy.zero_stage=0", "policy.min_workers=1", "policy.lr=0.0001"]
    (tmp_path / "undisturbed").mkdir()
    undisturbed = train(tiny_run, tmp_path / "undisturbed", *recipe)
    assert undisturbed.code == 0, undisturbed.stderr
    folder = tmp_path / "disturbed"
    folder.mkdir()
    copied(tiny_run, folder)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 2**27}, connect=False
    )
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=2**27) for _ in range(2)]
        process = start(folder, *recipe, address=cluster.address)
        wait_for_steps(process, folder, 8)
        cluster.remove_node(nodes[1], allow_graceful=False)
        output = process.communicate(timeout=500)[0]
    finally:
        cluster.shutdown()
    assert process.returncode == 0, output
    done = Finished(folder / "run", 0, output, "")
    assert len(stats(done)["continued_after"]) == 1
    assert_same_weights(weights(done), weights(undisturbed), atol=1e-5)


def wait_for_fewer(process: object, folder: Path, before: int, total: int) -> None:
    """Until the new workers have begun: the lines beyond the checkpoint are gone, or there are more."""
    import time

    deadline = time.monotonic() + 300
    while steps_done(folder) == before and before < total:
        assert time.monotonic() < deadline
        time.sleep(0.05)
