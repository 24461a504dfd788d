"""Evaluation of several backbones without an LLM: tables, model cards, and what a killed run keeps."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from dpo4rec_ray.rerankers.fit import load_reranker
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.reading import read_catalogue
from tests.conftest import DEMO, TINY, Finished, run_job

pytestmark = pytest.mark.ray
SETTINGS = [
    *TINY,
    "llm.source=statistics",
    "run.num_rounds=0",
    'evaluate.backbones=["dlcm", "mir"]',
    'reranker.per_backbone.dlcm={lr=2e-3, input_layer="concat"}',
]


SYSTEMS = ("backbone", "statistics", "random-texts")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    done = run_job(tmp_path_factory.mktemp("evaluated"), DEMO, *SETTINGS)
    assert done.code == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def test_no_llm_and_no_reward_are_needed(evaluated: Finished) -> None:
    summary = evaluated.summary
    assert [stage["stage"] for stage in summary["stages"]] == ["prepare", "encode", "references", "evaluate"]
    assert summary["generator"] == "statistics" and summary["rounds"] == []
    fits = {(row["backbone"], row["system"], row["seed"]) for row in summary["evaluation"]}
    assert fits == {
        *((backbone, system, seed) for backbone in ("dlcm", "mir") for system in SYSTEMS for seed in (0, 1)),
        *(("none", system, 0) for system in ("random", "popularity", "upper-bound")),
    }  # fmt: skip


def test_the_tables_hold_the_metrics_of_the_summary(evaluated: Finished) -> None:
    folder = evaluated.folder / "eval"
    with open(folder / "table.csv", encoding="utf-8") as handle:
        lines = {(row["backbone"], row["system"]): row for row in csv.DictReader(handle)}
    for row in evaluated.summary["systems"]:
        assert float(lines[row["backbone"], row["system"]]["ndcg@10"]) == pytest.approx(row["ndcg@10"])
    for name in ("table1.csv", "table.md", "table.tex", "comparisons.csv", "breakdown.csv"):
        assert "statistics" in (folder / name).read_text(encoding="utf-8"), name
    assert {row["against"] for row in evaluated.summary["comparisons"]} == {"backbone", "popularity"}
    kinds = {row["by"] for row in evaluated.summary["breakdown"]}
    assert kinds == {"history length", "lists of the user", "popularity"}
    assert "DLCM" in evaluated.stdout and "statistics" in evaluated.stdout


def test_every_fit_is_saved_with_its_card(evaluated: Finished) -> None:
    folder = evaluated.folder / "eval" / "rerankers"
    catalogue = read_catalogue(RunDir(evaluated.folder))
    names = {
        f"{backbone}-{system}-seed{seed}"
        for backbone in ("dlcm", "mir")
        for system in SYSTEMS
        for seed in (0, 1)
    }
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        model = load_reranker(folder / name, catalogue)
        assert model.architecture.backbone == name.split("-")[0]
        assert model.knowledge == ("-backbone-" not in name)
        assert (model.architecture.input_layer == "concat") == name.startswith("dlcm")
        card = (folder / name / "README.md").read_text(encoding="utf-8")
        for fact in ("dataset | sample", "protocol | user", "test ndcg@5", "torch", "lr"):
            assert fact in card, fact
        suffixes = {path.suffix for path in (folder / name).iterdir()}
        assert suffixes == {".safetensors", ".json", ".md"}, "nothing that has to be unpickled"


def test_a_killed_evaluation_keeps_its_finished_fits(evaluated: Finished) -> None:
    """As after a kill: no manifest, and two fits were not committed: a backbone's, and one behind a backbone that is saved."""
    folder = evaluated.folder / "eval"
    before = evaluated.summary["evaluation"]
    parts = sorted(folder.glob("part-*.parquet"))
    times = {path: os.stat(path).st_mtime_ns for path in parts}
    (folder / "manifest.json").unlink()
    parts[2].unlink()
    parts[5].unlink()
    again = run_job(evaluated.folder.parent, DEMO, *SETTINGS)
    assert again.code == 0, again.stderr
    assert "10 fits kept from an interrupted run" in again.stdout
    written = {path for path in parts if os.stat(path).st_mtime_ns != times[path]}
    assert written == {parts[2], parts[5], parts[-1]}, "the missing fits, and the systems without a fit"
    assert again.summary["evaluation"] == before
    assert not list(Path(folder).glob("*.tmp*"))
