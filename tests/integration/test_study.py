"""Studies read off a real run; and an ablation that is killed in a variant's training, and finished by the same command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dpo4rec_ray.config import read_config
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.studies import ablation, backbone_transfer
from dpo4rec_ray.studies.every_study import QUESTIONS, study_of
from dpo4rec_ray.studies.measures import AGAINST, FIGURES, TEST_AGAINST
from dpo4rec_ray.studies.results import plot
from dpo4rec_ray.studies.study_parts import NAME, SeedRuns, Study, by_name, measured, said
from tests.conftest import ROOT, TINY, Finished, end_by_themselves, still_runs, until

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

# Without redraws and folds there are no variants that leave these out: three are left.
FEW = ["reward.num_redraws=0", "reward.num_folds=1"]


def started(root: Path) -> subprocess.Popen[str]:
    changes = [*TINY, *FEW, f"run.root={root}"]
    return subprocess.Popen(
        [sys.executable, "-m", "dpo4rec_ray", "study", "ablation", "demo", *changes],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def with_itself(study: Study, run: Finished) -> list[SeedRuns]:
    """As if every variant of two seeds had come to the very run of the recipe."""
    config, store = read_config(run.folder), RunDir(run.folder)
    return [SeedRuns(seed, config, store, dict.fromkeys(study.variants(config), store)) for seed in (0, 1)]


@pytest.mark.parametrize("name", [name for name in QUESTIONS if name not in ("backbone_transfer", "drift")])
def test_a_variant_that_is_the_recipe_differs_in_nothing(name: str, tiny_run: Finished) -> None:
    """And the figures of the recipe itself are those of its own report, of users and lists that count twice."""
    study = study_of(name)
    rows = study.rows(with_itself(study, tiny_run))
    assert study.sentence(rows) and plot(study, rows).startswith(b"<svg")
    trained = [
        row for row in rows if row[NAME] not in (ablation.PLAIN, ablation.BASE_LLM, ablation.CHOSEN, "N = 1")
    ]
    assert {said(row[column]) for row in trained for column in (AGAINST, TEST_AGAINST) if column in row} <= {
        "0"
    }
    [round_one] = tiny_run.summary["rounds"]
    for row in trained:
        for column, figure in FIGURES.items():
            if column in row:
                own = round_one["figures"][figure]["change"]
                assert measured(row, column).interval.mean == pytest.approx(own, abs=1e-5)


def test_systems_of_one_run_are_compared_as_in_its_own_tables(
    tiny_run: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = {
        (row["system"], row["against"]): row["delta"]
        for row in tiny_run.summary["comparisons"]
        if row["backbone"] == "prm" and row["metric"] == "ndcg@5"
    }
    study = study_of("ablation")
    rows = by_name(study.rows(with_itself(study, tiny_run)))
    for name, system in ((ablation.PLAIN, "backbone"), (ablation.BASE_LLM, "base-llm")):
        found = measured(rows[name], TEST_AGAINST).interval.mean
        assert found == pytest.approx(-deltas["dpo4rec-round1", system], abs=1e-6)
    monkeypatch.setattr(backbone_transfer, "RERANKERS", {"prm": None})  # the one that the run evaluated
    study = study_of("backbone_transfer")
    [row] = study.rows(with_itself(study, tiny_run))
    found = measured(row, backbone_transfer.final("prm")).interval.mean
    assert found == pytest.approx(deltas["dpo4rec-round1", "base-llm"], abs=1e-6)


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    base, study = RunDir(tmp_path / "demo"), tmp_path / "demo-study-ablation"
    swapped = RunDir(study / "swapped-pairs-seed0")
    first = started(tmp_path)
    # The recipe's own policy is lent first; that of the variant begins where it is gone.
    until(
        lambda: (
            first.poll() is not None
            or (
                (swapped.root / "config.json").exists()
                and swapped.manifest("policy", 1) is None
                and (swapped.path("policy", 1) / "metrics.jsonl").exists()
            )
        ),
        1200,
    )
    assert first.poll() is None, first.communicate()
    [job] = psutil.Process(first.pid).children()
    workers = job.children(recursive=True)
    first.kill()
    first.communicate()
    until(lambda: not still_runs(job), 5)
    end_by_themselves(workers)
    assert swapped.manifest("policy", 1) is None, "the kill must come in the middle"
    random = RunDir(study / "random-pairs-seed0")
    before = {store: store.require("policy", 1).produced for store in (base, random)}

    again = started(tmp_path)
    out, errors = again.communicate(timeout=1200)
    assert again.returncode == 0, errors
    assert f"study: recipe, seed 0: finished before, {base.root}" in out
    assert "study: random pairs, seed 0: finished before" in out
    assert {store: store.require("policy", 1).produced for store in before} == before

    found = json.loads((study / "study.json").read_text())
    assert (
        found["seeds"] == [0]
        and found["reading"] in out
        and found["reading"] in (study / "study.md").read_text()
    )
    assert (study / "study.svg").read_text().startswith("<svg")
    rows = {row["variant"]: row for row in found["rows"]}
    assert list(rows) == [
        *("no knowledge", "no training: base LLM", "recipe", "random pairs", "swapped pairs"),
        *("no DPO: trained on the best of N", "no DPO: the best of N is chosen"),
    ]
    assert rows["no training: base LLM"]["held-out reward gain"]["mean"] == 0
    assert rows["recipe"]["test NDCG@5 against the recipe"]["mean"] == 0
    own = base.require("heldout", 1).stats["figures"]["reward"]["change"]
    assert rows["recipe"]["held-out reward gain"]["mean"] == pytest.approx(own, abs=1e-5)
    stages = found["stages"]["swapped pairs, seed 0"]
    kept = dict.fromkeys(
        ("prepare(0)", "encode(0)", "references(0)", "train_reward(0)", "generate(1)", "score(1)"), "kept"
    )
    assert stages == kept | dict.fromkeys(
        ("pair(1)", "dpo(1)", "encode(1)", "validate(1)", "evaluate(1)"), "redone"
    )
