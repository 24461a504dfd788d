"""Metrics per version, added up over processes. Prometheus' client reads its folder once, so each test starts processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

CODE = """
import sys
import numpy as np
from dpo4rec_ray.serving.request_metrics import ServingMetrics
from dpo4rec_ray.serving.loaded_version import Ranking

nan = float("nan")
def ranking(scores, knowledge="stored"):
    scores = np.array(scores, np.float32)
    order = np.argsort(-scores, kind="stable")
    known = int(np.isfinite(scores).sum())
    return Ranking(order=order, scores=scores, num_known=known, knowledge=knowledge, known_user=True)

metrics = ServingMetrics(sys.argv[1] or None)
metrics.answered("v1", ranking([1, 2, nan]), False, 0.002)
metrics.answered("v1", ranking([nan], "none"), True, 0.3)
metrics.answered("v2", ranking([1, 2], "fresh"), False, 9.0)
metrics.failed("v2")
metrics.overloaded()
metrics.shadowed("v3", ranking([3, 2, 1]), ranking([1, 2, 3]))
metrics.shadowed("v3", ranking([6, 5, 4, 3, 2, 1]), ranking([6, 5, 4, 3, 1, 2]))
if sys.argv[2]:
    content, kind = metrics.text()
    assert kind.startswith("text/plain"), kind
    print(content.decode())
"""


def metrics(folder: str, show: bool = True) -> dict[str, float]:
    """Sample name -> value, after a process has counted."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PROMETHEUS")}
    done = subprocess.run(
        [sys.executable, "-c", CODE, folder, "show" if show else ""],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.rpartition(" ") for line in done.stdout.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


EXPECTED = {
    'answers_total{knowledge="stored",version="v1"}': 1,
    'answers_total{knowledge="none",version="v1"}': 1,
    'answers_total{knowledge="fresh",version="v2"}': 1,
    'fallbacks_total{version="v1"}': 1,
    'candidates_total{version="v1"}': 4,
    'candidates_total{version="v2"}': 2,
    'unknown_candidates_total{version="v1"}': 2,
    'failures_total{version="v2"}': 1,
    "overloads_total": 1,
    'shadow_answers_total{version="v3"}': 2,
    'shadow_same_first_total{version="v3"}': 1,
    'seconds_count{version="v1"}': 2,
    'seconds_sum{version="v1"}': 0.302,
    'seconds_bucket{le="0.0025",version="v1"}': 1,
    'seconds_bucket{le="0.5",version="v1"}': 2,
    'seconds_bucket{le="2.5",version="v2"}': 0,
    'seconds_bucket{le="+Inf",version="v2"}': 1,
}


def check(found: dict[str, float], times: int) -> None:
    for name, value in EXPECTED.items():
        assert abs(found[f"dpo4rec_serve_{name}"] - times * value) < 1e-6, name
    # Three of three in common, then four of the first five.
    assert abs(found['dpo4rec_serve_shadow_same_top_total{version="v3"}'] - times * 1.8) < 1e-6


def test_what_one_process_counts() -> None:
    check(metrics(""), 1)


def test_processes_of_one_folder_are_added_up(tmp_path: Path) -> None:
    """A process that has ended still counts: counters never fall."""
    folder = tmp_path / "node" / "session"
    metrics(str(folder), show=False)
    check(metrics(str(folder)), 2)
    assert folder.stat().st_mode & 0o077 == 0, "nobody else reads or writes there"
    check(metrics(str(tmp_path / "other")), 1)
