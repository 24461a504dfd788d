from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo4rec_ray.evaluation.tables import summarise
from dpo4rec_ray.report import page
from dpo4rec_ray.store.artifacts import RunDir
from tests.unit.evaluation.frames import ABOUT, DLCM, SIMPLE, frame


def report(tmp_path: Path, **changes: Any) -> str:
    """The page of a run without rounds."""
    about = {"run": "own", "seed": 3, "generator": "statistics", "trainer": "none", "best_round": 0}
    spent = {"total_seconds": 61.2, "peak_rss_mb": 512, "stages": [], "versions": {"ray": "2"}}
    evaluated = summarise(frame(SIMPLE | DLCM), ABOUT, 100)
    summary = {**about, **spent, **evaluated, "rewards": {}, "rounds": [], **changes}
    return page._html(RunDir(tmp_path), summary)


def test_every_system_and_difference_is_on_the_page(tmp_path: Path) -> None:
    html = report(tmp_path)
    assert html.count("<td>DLCM</td>") == 3
    assert "DLCM: dpo4rec-round1 minus base-llm" in html
    assert "<td>0.5000 ± 0.1768</td>" in html  # base-llm: .375 and .625 over seeds
    assert html.count("data:image/png;base64,") == 1


def test_names_from_outside_are_text_and_not_markup(tmp_path: Path) -> None:
    html = report(tmp_path, run="<script>alert(1)</script>", versions={"<b>": "&"})
    assert "<script>" not in html and "<b>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "&lt;b&gt; &amp;" in html


def test_a_round_shows_its_ladder_its_figures_and_why_it_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "_plot_rewards", lambda *_: "")
    monkeypatch.setattr(page, "_plot_training", lambda *_: "")
    figure = {"before": 0.1, "after": 0.3, "change": 0.2, "change_ci95": [0.1, 0.3]}
    unknown = {"value": 0.5, "ci95": None, "verdict": "not shown", "says": "<i>why</i>"}
    row = {
        "round": 1,
        "heldout_users": 9,
        "choice": {"kept": False, "against": 0, **_interval("reward", 0.2), **_interval("reading", -0.2)},
        "figures": {"reading": figure},
        "ladder": [{"name": "shuffle drop", **unknown}],
        **{name: {} for name in ("training", "diagnosis", "dropped")},
    }
    html = report(tmp_path, rounds=[row])
    assert "Round 1: not kept" in html
    assert "Against round 0: reward +0.2000 [+0.1000, +0.3000], reading" in html
    assert "<td>shuffle drop</td><td>+0.5000</td>" in html and "&lt;i&gt;why&lt;/i&gt;" in html
    assert "<td>0.1000</td><td>0.3000</td><td>+0.2000</td><td>[+0.1000, +0.3000]</td>" in html
    assert html.count("reading gain)") == 1 and "style gain)" not in html, "only figures that there are"


def _interval(name: str, mean: float) -> dict[str, Any]:
    return {name: mean, f"{name}_ci95": [mean - 0.1, mean + 0.1]}
