"""KAR's own candidate lists, read as a team's logged lists: our backbones beside the metrics of KAR's code on them.

As in KAR's code, and nowhere in a run: the epoch is chosen on the lists that the metrics are of, and an item has its first
genre alone. About ten minutes on two cores; `pytest -m slow -rP` prints every metric.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo4rec_ray.config.ranking import FitSection, RerankerArchitecture
from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.rerankers import build_reranker
from dpo4rec_ray.rerankers.catalogue import Catalogue
from dpo4rec_ray.rerankers.fit import ListData, fit
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.reading import popularity, read_list_data
from tests.conftest import run_job

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
LISTS = DATA / "ml-1m-reference-lists" / "lists.parquet"
METRICS = ("map_paper@5", "ndcg@5")
SETRANK_SEEDS = range(12)
# What KAR's DLCM reaches, mean of 3 seeds, and how near ours has to come.
KAR_DLCM, NEAR = (0.6613, 0.6991), 0.006
# PRM and SetRank once they have left the plateau at popularity's level, where KAR's early stopping leaves them.
PAST_PLATEAU = (0.666, 0.705)
# NDCG@5 of a seed that learned: SetRank is at .36 to .50 where it has not, and popularity at .65.
ALIVE = 0.60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not LISTS.is_file(), reason="KAR's lists are not at ../shared/data"),
]


@dataclass(frozen=True)
class World:
    """The lists as KAR's code has them: its test users' lists are held out, all others are trained on."""

    catalogue: Catalogue
    train: ListData
    held_out: ListData

    def metrics(self, scores: np.ndarray) -> tuple[float, ...]:
        """METRICS of scores of the held-out lists, means over the lists."""
        lists = self.held_out
        values = list_metrics(scores, lists.labels.numpy(), METRICS, lists.mask.numpy())
        return tuple(float(values[name].mean()) for name in METRICS)


@dataclass(frozen=True)
class Trained:
    """METRICS of the best epoch, and of every epoch the one it was chosen by."""

    metrics: tuple[float, ...]
    curve: list[float]


@cache
def read_world(folder: Path) -> World:
    """Once per process."""
    store = RunDir(folder)
    attributes = store.read("items", columns=["attributes"])["attributes"].to_pylist()
    first_genres = [[text for text in item if text.startswith("genre: ")][:1] for item in attributes]
    return World(
        Catalogue.from_items(first_genres),
        read_list_data(store, ("train", "valid")),
        read_list_data(store, "test"),
    )


def train(folder: Path, backbone: str, input_layer: str, section: FitSection, seed: int) -> Trained:
    """In a process of its own, on one thread."""
    torch.set_num_threads(1)
    world = read_world(folder)
    architecture = RerankerArchitecture(backbone=backbone, input_layer=input_layer)
    model = build_reranker(architecture, world.catalogue.shape, knowledge=False, seed=seed)
    result = fit(model, world.catalogue, world.train, world.held_out, None, section, seed=seed)
    lists = world.held_out
    metrics = world.metrics(ListScorer([model], world.catalogue).score(lists.item_ids, lists.mask))
    return Trained(metrics, [record["valid"] for record in result.history])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the lists, from the recipe's prepare stage."""
    columns = {"split": "split", "history": "history_item_ids", "history_ratings": "history_ratings"}
    done = run_job(
        tmp_path_factory.mktemp("reference"),
        "jobs/recipes/ml1m.toml",
        "--only",
        "prepare",
        f"data.raw_dir={DATA / 'ml-1m'}",
        "data.protocol=paper",
        f"logged.file={LISTS}",
        *(f"logged.{key}={column}" for key, column in columns.items()),
        "reranker.resample_negatives=false",
        "reward.num_redraws=0",
    )
    assert done.code == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.folder


@pytest.fixture(scope="module")
def trainings(folder: Path) -> Iterator[dict[tuple[str, int], Future[Trained]]]:
    """Every training, by backbone and seed, two at a time; the longest first."""
    kar = FitSection(
        epochs=50, batch_size=256, lr=5e-4, patience=3, metric="map_paper@5", resample_negatives=False
    )
    sixteen, four = (
        FitSection(epochs=epochs, batch_size=256, lr=1e-3, metric="ndcg@5", resample_negatives=False)
        for epochs in (16, 4)
    )
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        jobs = [("prm", "linear", sixteen, 0), ("setrank", "linear", sixteen, 0)]
        jobs += [("dlcm", "concat", kar, seed) for seed in range(3)]
        jobs += [("setrank", "linear", four, seed) for seed in SETRANK_SEEDS if seed]
        yield {
            (backbone, seed): pool.submit(train, folder, backbone, input_layer, section, seed)
            for backbone, input_layer, section, seed in jobs
        }
        pool.shutdown(cancel_futures=True)


def test_the_lists_are_those_of_the_log(folder: Path) -> None:
    """94,200 and 9,497 lists of 3,615 items, and the reference's upper bound: the share of lists with a positive."""
    world = read_world(folder)
    assert (len(world.train), len(world.held_out)) == (94_200, 9_497)
    assert world.catalogue.shape.num_items == 3_615
    labels = world.held_out.labels.numpy()
    assert [round(value, 3) for value in world.metrics(labels)] == [0.896, 0.896]


def test_popularity(folder: Path) -> None:
    world = read_world(folder)
    counts = popularity(world.train, world.catalogue.shape.num_items)
    found = world.metrics(counts[world.held_out.item_ids.numpy()])
    assert [round(value, 4) for value in found] == [0.6221, 0.6502]


def test_dlcm_is_kars(trainings: dict[tuple[str, int], Future[Trained]]) -> None:
    """On the bare concatenation at KAR's setting, mean of 3 seeds."""
    found = [trainings["dlcm", seed].result().metrics for seed in range(3)]
    print("DLCM", METRICS, found, "mean", np.mean(found, axis=0))
    assert np.abs(np.mean(found, axis=0) - KAR_DLCM).max() <= NEAR


@pytest.mark.parametrize("backbone", ["prm", "setrank"])
def test_past_the_plateau(backbone: str, trainings: dict[tuple[str, int], Future[Trained]]) -> None:
    """Sixteen epochs without patience, of what a run has by default."""
    trained = trainings[backbone, 0].result()
    print(backbone, METRICS, trained)
    assert all(value >= least for value, least in zip(trained.metrics, PAST_PLATEAU, strict=True))


def test_no_seed_of_setrank_dies(trainings: dict[tuple[str, int], Future[Trained]]) -> None:
    """After four epochs; in KAR's code 7 of 12 never learn."""
    reached = {seed: trainings["setrank", seed].result().curve[3] for seed in SETRANK_SEEDS}
    print("SetRank, NDCG@5 after 4 epochs", reached)
    assert min(reached.values()) >= ALIVE
