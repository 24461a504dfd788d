"""Runs on three machines with private disks: the same rows and figures as on one; one job per run."""

from __future__ import annotations

import json

import pytest

from tests.conftest import Finished, until
from tests.machine_cluster import MARKS, Cluster
from tests.same_runs import assert_same

pytestmark = [*MARKS, pytest.mark.chaos]


def test_the_same_rows_and_figures_as_on_one_machine(cluster: Cluster, tiny_run: Finished) -> None:
    done = cluster.head.run(cluster.submitted("plain"), timeout=1500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert_same(cluster.run_dir("plain"), tiny_run, within=1e-4)


def test_a_second_job_on_the_same_run_is_refused(cluster: Cluster) -> None:
    first = cluster.nodes[1].popen(cluster.line("twice"), cluster.logs / "twice.log")
    until(lambda: any((cluster.run_dir("twice").root / ".lease").glob("*.json")), 120)
    second = cluster.nodes[2].run(cluster.line("twice"), timeout=300)
    assert first.poll() is None, "the first job had ended"
    assert second.returncode == 2, second.stdout + second.stderr
    [line] = [one for one in second.stderr.splitlines() if one.startswith("error:")]
    assert "another job (process " in line and "Traceback" not in second.stderr
    cluster.nodes[1].run("pkill -TERM -f '[j]obs/run.py'")
    assert first.wait(120) == 143
    [lease] = (cluster.run_dir("twice").root / ".lease").glob("*.json")
    assert json.loads(lease.read_text())["ended"]
