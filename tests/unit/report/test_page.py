from __future__ import annotations

from pathlib import Path
from typing import Any

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
