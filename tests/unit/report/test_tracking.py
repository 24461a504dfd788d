"""The figures of a whole run in each tracker, for real: once, also when the run is continued."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo4rec_ray.config import Config, load_config, read_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.pipeline import STAGES
from dpo4rec_ray.report.tracking import RunTracking, tracked
from dpo4rec_ray.running import Selection, run_pipeline
from dpo4rec_ray.stages.evaluate import EVALUATION
from dpo4rec_ray.store.artifacts import Manifest, RunDir, write_json
from dpo4rec_ray.store.outcome import Outcome
from tests.tracker_records import shown, wandb_records, wandb_rows

pytestmark = pytest.mark.usefixtures("own_settings_only")

CHANGE = {"before": 0.25, "after": 0.5, "change": 0.25, "change_ci95": [0.125, 0.375]}
MADE = {
    ("score", "scores", 1): {"mean_reward": 0.5, "spread": 0.25, "carried": float("nan")},
    ("pair", "pairs", 1): {"pairs": 12, "heldout_pairs": 3},
    ("validate", "heldout", 1): {
        "figures": {"reward": CHANGE, "reading": CHANGE, "others_reward": CHANGE},
        "choice": {"kept": True},
    },
    ("evaluate", "per_list", 0): {},
}
SYSTEM = {"backbone": "prm", "system": "dpo4rec-round1", "ndcg@5": 0.5, "map_paper@5": 0.75}
AGAINST = {"backbone": "prm", "system": "dpo4rec-round1", "against": "base-llm"}
EVALUATED = {
    "systems": [SYSTEM],
    "comparisons": [
        AGAINST | {"metric": "ndcg@5", "delta": 0.125, "ci95": [-0.125, 0.375]},
        AGAINST | {"metric": "hr@10", "delta": 0.5, "ci95": [0.25, 0.75]},
    ],
}
EXPECTED = {
    "reward/mean": 0.5, "reward/spread": 0.25, "pairs/train": 12, "pairs/heldout": 3,
    "heldout/reward_before": 0.25, "heldout/reward_after": 0.5,
    **{f"heldout/{name}": 0.25 for name in ("reward_change", "reading_gain", "style_gain")},
    **{f"heldout/{name}_low": 0.125 for name in ("reward_change", "reading_gain", "style_gain")},
    **{f"heldout/{name}_high": 0.375 for name in ("reward_change", "reading_gain", "style_gain")},
    "heldout/round_kept": 1,
    "test/prm/dpo4rec-round1/ndcg_at_5": 0.5, "test/prm/dpo4rec-round1/map_paper_at_5": 0.75,
    "test/prm/dpo4rec-round1_minus_base-llm/ndcg_at_5": 0.125,
    "test/prm/dpo4rec-round1_minus_base-llm/ndcg_at_5_low": -0.125,
    "test/prm/dpo4rec-round1_minus_base-llm/ndcg_at_5_high": 0.375,
}  # fmt: skip


def recipe(folder: Path, *trackers: str) -> tuple[Config, RunDir]:
    store = RunDir(folder / "own")
    store.root.mkdir(exist_ok=True)
    return load_config(
        "demo", [f"run.root={folder}", "run.name=own", f"run.trackers={list(trackers)}"]
    ), store


def make(store: RunDir, step: tuple[str, str, int], produced: str = "first") -> None:
    stats = MADE[step]
    store.start(step[1], step[2])
    if step[0] == "evaluate":
        write_json(store.path("per_list") / EVALUATION, EVALUATED)
    store.finish(Manifest(step[1], "print", 1, produced=produced, stats=stats), step[2])


def tell(tracking: RunTracking, store: RunDir) -> None:
    """What the runner does: every step that is complete, in order, whether it was run or kept."""
    for stage, artifact, number in MADE:
        manifest = store.manifest(artifact, number)
        if manifest:
            tracking.stage(stage, 1, manifest)


def in_two_goes(folder: Path, tracker: str) -> RunDir:
    """Stopped by an error after `pair`, continued to the end, and then called once more."""
    config, store = recipe(folder, tracker)
    for step in list(MADE)[:2]:
        make(store, step)
    with pytest.raises(ZeroDivisionError), tracked(config, store) as tracking:
        tell(tracking, store)
        raise ZeroDivisionError
    for step in list(MADE)[2:]:
        make(store, step)
    make_policy(store)
    for _ in range(2):
        with tracked(config, store) as tracking:
            tell(tracking, store)
            tracking.links(1)
    return store


def make_policy(store: RunDir) -> None:
    store.start("policy", 1)
    store.finish(Manifest("policy", "", 1), 1)
    for name in ("report.html", "summary.json"):
        (store.root / name).write_text("{}")


def test_tensorboard_has_every_figure_once(tmp_path: Path) -> None:
    store = in_two_goes(tmp_path, "tensorboard")
    found = shown(store.root)
    texts = {tag: len(found.pop(tag)) for tag in list(found) if tag.endswith("text_summary")}
    assert texts == {"settings/text_summary": 1, "links/text_summary": 1}
    assert found == {name: [(1, value)] for name, value in EXPECTED.items()}


def test_mlflow_has_every_figure_once_in_one_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    store = in_two_goes(tmp_path, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{store.root}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("dpo4rec-ray").experiment_id])
    assert (run.info.run_name, run.info.status) == ("own", "FINISHED")
    assert run.data.metrics == EXPECTED
    for name in EXPECTED:
        assert [point.step for point in client.get_metric_history(run.info.run_id, name)] == [1], name
    assert run.data.params["dpo.beta"] == "0.1" and len(run.data.params) > 150
    assert run.data.tags["report"] == (store.root / "report.html").as_uri()
    assert run.data.tags["policy-1"] == store.path("policy", 1).as_uri()


def test_wandb_has_every_figure_once_in_one_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    store = in_two_goes(tmp_path, "wandb")
    rows = wandb_rows(store.root)
    figures = [(name, float(row[name])) for row in rows for name in row if name in EXPECTED]
    assert sorted(figures) == sorted(EXPECTED.items())
    assert [int(row["_step"]) for row in rows if "turn" in row] == [1, 2, 3, 4]
    run_id = json.loads((store.root / "wandb.json").read_text())["run_id"]
    files = list(store.root.glob("wandb/offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
    records = [record for file in files for record in wandb_records(file)]
    linked = [record for record in records if store.path("policy", 1).as_uri().encode() in record]
    assert len(linked) == 1


def test_a_stage_that_was_run_again_sends_its_new_figures(tmp_path: Path) -> None:
    config, store = recipe(tmp_path, "tensorboard")
    score = next(iter(MADE))
    for produced in ("first", "second", "second"):
        make(store, score, produced)
        with tracked(config, store) as tracking:
            tell(tracking, store)
    assert shown(store.root)["reward/mean"] == [(1, 0.5), (1, 0.5)]


def test_a_tracker_whose_run_was_removed_begins_anew(tmp_path: Path) -> None:
    """What the removed one had is sent again; the other tracker keeps what it has."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    config, store = recipe(tmp_path, "mlflow", "tensorboard")
    make(store, next(iter(MADE)))
    for _ in range(2):
        with tracked(config, store) as tracking:
            tell(tracking, store)
        (store.root / "mlflow.json").unlink()
    client = mlflow.MlflowClient(f"sqlite:///{store.root}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("dpo4rec-ray").experiment_id])
    assert [run.data.metrics["reward/mean"] for run in runs] == [0.5, 0.5]
    assert shown(store.root)["reward/mean"] == [(1, 0.5)]


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody deletes its run: it is said once, and the other tracker gets everything."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    config, store = recipe(tmp_path, "mlflow", "tensorboard")
    for step in MADE:
        make(store, step)
    with tracked(config, store) as tracking:
        run_id = json.loads((store.root / "mlflow.json").read_text())["run_id"]
        mlflow.MlflowClient(f"sqlite:///{store.root}/mlflow.db").delete_run(run_id)
        tell(tracking, store)
    assert capsys.readouterr().out.count("tracker mlflow: ") == 1
    assert shown(store.root).keys() - {"settings/text_summary"} == EXPECTED.keys()


def test_the_runner_tells_of_every_complete_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stage is asked for; those that were complete before are told too, at their round, and a second call adds nothing."""
    config, store = recipe(tmp_path, "tensorboard")
    for step in MADE:
        make(store, step)
    monkeypatch.setitem(STAGES, "prepare", replace(STAGES["prepare"], run=prepare))
    for _ in range(2):
        run_pipeline(config, store, Selection(only="prepare"))
    found = shown(store.root)
    found.pop("settings/text_summary")
    assert found == {name: [(1, value)] for name, value in EXPECTED.items()}


def prepare(config: Config, store: RunDir, round_id: int) -> Outcome:
    for name in ("users", "items", "truth", "lists"):
        store.start(name)
    return Outcome(rows_in=1, rows_out=1)


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    config, store = recipe(tmp_path)
    for step in MADE:
        make(store, step)
    before = sorted(store.root.rglob("*"))
    with tracked(config, store) as tracking:
        tell(tracking, store)
        tracking.links(1)
    assert sorted(store.root.rglob("*")) == before


def test_the_former_keys_are_read_from_old_runs(tmp_path: Path) -> None:
    old: dict[str, Any] = {"policy": {"trackers": ["mlflow"]}, "bootstrap": {"trackers": []}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert read_config(tmp_path).run.trackers == ("mlflow",)
    with pytest.raises(UserError, match=r"policy\.trackers is called run\.trackers now"):
        load_config("demo", ['policy.trackers=["mlflow"]'])
