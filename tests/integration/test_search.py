from __future__ import annotations

import csv
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo4rec_ray import grid_search
from dpo4rec_ray.config import Config, load_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers.catalogue import Catalogue
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.reading import read_list_data
from tests.conftest import DEMO, ROOT, TINY, run_job

COMPARED = ("metric", "valid", "best epoch", "epochs", "ended")


@dataclass(frozen=True)
class Searched:
    """A search by jobs/search.py and what it ran on."""

    store: RunDir
    changes: list[str]
    stdout: str

    @property
    def config(self) -> Config:
        return load_config(ROOT / DEMO, self.changes)

    @property
    def rows(self) -> list[dict[str, str]]:
        with open(self.store.root / "search" / "results.csv", newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """Three trials of three epochs for each of two backbones, in a folder where nothing is prepared yet."""
    root = tmp_path_factory.mktemp("search")
    changes = [*TINY, "reranker.epochs=3", f"run.root={root}", "run.name=run"]
    flags = ["--backbones", "dlcm,prm", "--knowledge", "none", "--trials", "3"]
    done = subprocess.run(
        [sys.executable, "jobs/search.py", DEMO, *changes, *flags],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return Searched(RunDir(root / "run"), changes, done.stdout)


@pytest.fixture(scope="module")
def ray_local(searched: Searched) -> Iterator[None]:
    """Ray in this process; after the search above, which has its own."""
    import ray

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**27
    )
    yield
    ray.shutdown()


@pytest.mark.ray
def test_every_trial_is_a_row_and_the_best_stand_first(searched: Searched) -> None:
    rows = searched.rows
    assert [row["backbone"] for row in rows] == ["dlcm"] * 3 + ["prm"] * 3
    for own in (rows[:3], rows[3:]):
        settings = [(row["batch_size"], row["lr"], row["weight_decay"]) for row in own]
        assert len(set(settings)) == 3
        stats = [float(row["valid"]) for row in own]
        assert stats == sorted(stats, reverse=True)
        assert all(0 < value <= 1 for value in stats)
        assert {(row["metric"], row["epochs"], row["ended"]) for row in own} == {("ndcg@5", "3", "complete")}
        assert all(1 <= int(row["best epoch"]) <= 3 for row in own)
    page = (searched.store.root / "search" / "results.md").read_text()
    assert page.count("\n| dlcm | ") == page.count("\n| prm | ") == 3
    assert (
        "search prm: the best of 3 trials" in searched.stdout
        and "View detailed results" not in searched.stdout
    )
    names = {file.name for file in (searched.store.root / "search").iterdir()}
    assert names == {"results.csv", "results.md", "found.toml"}, "Tune's own files are gone"


@pytest.mark.ray
def test_the_fragment_sets_each_backbone_to_its_best_trial(searched: Searched) -> None:
    found = searched.store.root / "search" / "found.toml"
    config = load_config(ROOT / DEMO, [*searched.changes, str(found)])
    for best in (searched.rows[0], searched.rows[3]):
        own = config.reranker.of(best["backbone"])
        assert (own.batch_size, own.lr, own.weight_decay) == (
            int(best["batch_size"]),
            float(best["lr"]),
            float(best["weight_decay"]),
        )
        assert f"valid ndcg@5 {best['valid']} at epoch {best['best epoch']}" in found.read_text()
    assert config.reranker.of("mir").lr == load_config(ROOT / DEMO).reranker.lr
    assert config.run.name == "run"


@pytest.mark.ray
def test_other_lists_than_those_of_training_and_validation_are_not_read(
    searched: Searched, ray_local: None
) -> None:
    """With test lists of items that do not exist, the same search finds the same."""
    before = [row for row in searched.rows if row["backbone"] == "dlcm"]
    [file] = searched.store.files("lists")
    table = pq.read_table(file)
    rows = table.to_pylist()
    for row in rows:
        if row["split"] == "test":
            row["candidate_item_ids"] = [10**6] * len(row["candidate_item_ids"])
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    attributes = searched.store.read("items", columns=["attributes"])["attributes"].to_pylist()
    with pytest.raises(UserError, match="not in the catalogue"):
        Catalogue.from_items(attributes).check_ids(read_list_data(searched.store, "test").item_ids)

    grid_search.run(
        searched.config, searched.store, grid_search.SearchPlan(("dlcm",), num_trials=3, scheduler="none")
    )

    after = searched.rows
    assert [[row[name] for name in COMPARED] for row in after] == [
        [row[name] for name in COMPARED] for row in before
    ]


@pytest.mark.ray
def test_a_trial_that_fails_or_lags_behind_is_a_row_too(searched: Searched, ray_local: None) -> None:
    """One trial after the other: the first goes on to the end, what is worse at half of the epochs does not."""
    config = load_config(ROOT / DEMO, [*searched.changes, "reranker.epochs=8"])
    diverging, impossible = {"lr": 1e30}, {"embed_dim": -3}
    grid = ({"lr": 3e-3, "batch_size": 64}, diverging, {"lr": 1e-9}, {"lr": 1e-8}, impossible)
    trials = grid_search.run(
        config, searched.store, grid_search.SearchPlan(("prm",), grid=grid, concurrent=1)
    )
    by_lr = {trial.settings.get("lr"): trial for trial in trials}
    assert trials[0] is by_lr[3e-3] and (trials[0].epochs, trials[0].ended) == (8, "complete")
    for laggard in (by_lr[1e-9], by_lr[1e-8]):
        assert (laggard.epochs, laggard.ended) == (4, "stopped by the scheduler")
        assert laggard.valid < trials[0].valid
    assert "loss is nan" in by_lr[1e30].ended or "diverged" in by_lr[1e30].ended
    assert "negative dimension" in by_lr[None].ended
    assert [trial.failed for trial in trials] == [False, False, False, True, True]
    found = tomllib.loads((searched.store.root / "search" / "found.toml").read_text())
    assert found == {"reranker": {"per_backbone": {"prm": grid[0]}}}

    with pytest.raises(
        UserError, match=r"no trial came to its end; the first one failed: .*negative dimension"
    ):
        grid_search.run(config, searched.store, grid_search.SearchPlan(("prm",), grid=(impossible,)))


def test_a_fragment_that_is_not_there_is_named_on_one_line(tmp_path: Path) -> None:
    done = run_job(tmp_path, DEMO, "no/such/found.toml")
    assert done.code == 2
    assert done.stderr.count("\n") == 1 and "fragment no/such/found.toml: cannot be read" in done.stderr


def test_the_grid_is_the_papers() -> None:
    plain, with_experts = grid_search.paper_grid(adapter=False), grid_search.paper_grid(adapter=True)
    assert len(plain) == 4 * 2 * 3 and len(with_experts) == 4 * 2 * 3 * 3
    assert {tuple(sorted(settings)) for settings in plain} == {("batch_size", "lr", "weight_decay")}
    assert {settings["batch_size"] for settings in plain} == {64, 128, 256, 512}
    assert {settings["lr"] for settings in plain} == {5e-4, 1e-3}
    assert {settings["weight_decay"] for settings in plain} == {0, 1e-4, 1e-3}
    experts = {(s["num_shared_experts"], s["num_dedicated_experts"]) for s in with_experts}
    assert experts == {(2, 5), (3, 4), (2, 6)}
    assert len({tuple(settings.items()) for settings in with_experts}) == 72


def test_a_draw_has_distinct_members_of_the_grid_and_follows_both_seeds() -> None:
    grid = grid_search.paper_grid(adapter=False)
    drawn = grid_search.SearchPlan(("dlcm",), num_trials=6).settings(run_seed=0)
    assert len({tuple(settings.items()) for settings in drawn}) == 6
    assert [settings for settings in grid if settings in drawn] == drawn
    assert drawn == grid_search.SearchPlan(("prm",), num_trials=6).settings(run_seed=0)
    assert drawn != grid_search.SearchPlan(("dlcm",), num_trials=6, seed=1).settings(run_seed=0)
    assert drawn != grid_search.SearchPlan(("dlcm",), num_trials=6).settings(run_seed=1)
    assert grid_search.SearchPlan(("dlcm",), num_trials=0).settings(0) == grid
    assert grid_search.SearchPlan(("dlcm",), num_trials=99).settings(0) == grid


@pytest.mark.parametrize(("epochs", "expected"), [(1, 1), (3, 3), (4, 4), (7, 4), (9, 5), (20, 10)])
def test_no_trial_is_stopped_before_half_of_the_epochs(epochs: int, expected: int) -> None:
    assert grid_search.grace(epochs) == expected


def test_what_the_files_say_of_trials(tmp_path: Path) -> None:
    trials = [
        grid_search.Trial(
            "dlcm", {"batch_size": 64, "lr": 5e-4}, "map@5", 0.75, 3, 5, 1.26, "out of patience"
        ),
        grid_search.Trial("dlcm", {"batch_size": 128, "lr": 1e-5}, "map@5", ended="failed: loss is nan"),
        grid_search.Trial("prm", {"batch_size": 64, "lr": 5e-4}, "ndcg@5", ended="failed: loss is nan"),
    ]
    grid_search.write_results(tmp_path, trials, ["data: mine"])
    assert (tmp_path / "results.csv").read_text().splitlines() == [
        "backbone,batch_size,lr,metric,valid,best epoch,epochs,seconds,ended",
        "dlcm,64,0.0005,map@5,0.750000,3,5,1.3,out of patience",
        "dlcm,128,1e-05,map@5,,,,,failed: loss is nan",
        "prm,64,0.0005,ndcg@5,,,,,failed: loss is nan",
    ]
    assert "- data: mine\n" in (tmp_path / "results.md").read_text()
    text = (tmp_path / "found.toml").read_text()
    assert tomllib.loads(text) == {"reranker": {"per_backbone": {"dlcm": {"batch_size": 64, "lr": 0.0005}}}}
    assert "# data: mine\n" in text
    assert "# valid map@5 0.750000 at epoch 3, the best of 2 trials, 1 of which failed\n" in text
