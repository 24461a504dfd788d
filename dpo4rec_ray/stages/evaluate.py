"""Metrics of every system on the test lists. No other stage reads these lists.

Each system is trained on the training lists with its own knowledge, has its epoch chosen on the validation lists, and is
measured on the same test lists: one Ray task per backbone, system and seed. Random order, popularity and the upper bound
are measured too (docs/method.md section 7). The tables are made in `dpo4rec_ray/evaluation/tables.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.evaluation import paper_table, tables
from dpo4rec_ray.evaluation.systems import BACKBONE, HEADLINE, METRIC_NAMES
from dpo4rec_ray.prepare.inspection import files_of_run
from dpo4rec_ray.rerankers import Reranker
from dpo4rec_ray.rerankers.card import read_card
from dpo4rec_ray.rerankers.fit import WEIGHTS_FILE, ListData, load_reranker, save_reranker
from dpo4rec_ray.rerankers.fit_knowledge import KnowledgeFit, fit_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.storage.parquet import read_folder
from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store.artifacts import RunDir, write_json
from dpo4rec_ray.store.metrics_file import MetricsFile, remove_metrics
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.store.reading import (
    knowledge_vectors,
    popularity,
    read_catalogue,
    read_list_data,
    read_vectors,
    training_facts,
    without_copies,
)
from dpo4rec_ray.workers.shards import resume_parts
from dpo4rec_ray.workers.stage_workers import evaluation_tasks
from dpo4rec_ray.workers.tasks import run_tasks

# In the card of a reranker with knowledge behind its backbone:
GAIN, USED = "gain of texts on validation", "texts are used"
EVALUATION, OLD_EVALUATION = "metrics.json", "figures.json"  # the former name
BASE_LLM, STATISTICS = "base-llm", "statistics"
Scores = tuple[np.ndarray, np.ndarray]  # rows of some lists [m], and the scores of their candidates [m, L]


def system_name(config: Config, texts: int | str | None) -> str:
    """Name of the system that uses the texts of policy `texts`, the last of its round, or of a reference; None: no knowledge."""
    if texts is None:
        return BACKBONE
    if isinstance(texts, str):
        return f"{texts}-texts" if texts == "random" else texts  # "random" is the random order
    if texts == 0:
        return STATISTICS if config.llm.source == "statistics" else BASE_LLM
    return f"dpo4rec-round{config.run.round_of(texts)}"


def all_texts(config: Config, last_round: int) -> list[int | str | None]:
    """What the systems rank with, in the order of their parts: nothing, the references, the rounds."""
    references = [name for name in config.evaluate.references if name != config.llm.source]
    return [None, *references, *config.run.round_ends(last_round)]


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `per_list`: every system's metrics on every test list, the fitted rerankers, and the tables."""
    folder = store.path("per_list")
    finished = resume_parts(folder, store.fingerprint)
    texts = all_texts(config, round_id)
    # The slow ones first, so that no CPU waits at the end: fits with knowledge take longest.
    fits = [
        (backbone, one, seed)
        for one in reversed(texts)
        for backbone in config.evaluated_backbones
        for seed in range(config.evaluate.num_seeds)
    ]
    todo = [fit for fit in fits if _part(config, texts, *fit) not in finished]
    if len(todo) < len(fits):
        say(f"  evaluate: {len(fits) - len(todo)} fits kept from an interrupted run")
    remove_metrics(folder)
    jobs = _jobs(config, todo)
    run_tasks(
        _fit_and_measure,
        (config, store, texts),
        jobs,
        workers=evaluation_tasks(config),
        label="evaluate",
        folder=folder,
        total=sum(
            config.reranker.of(backbone).total_epochs(own.count(None), len(own) - own.count(None))
            for backbone, own, _ in jobs
        ),
    )
    test, num_items = read_list_data(store, "test"), store.require("items").rows
    popular = popularity(read_list_data(store, "train"), num_items)[test.item_ids.numpy()]
    store.write("per_list", _simple_systems(config, store, test, popular), part=len(fits))
    per_list = read_folder(folder)
    _summarise(
        config,
        store,
        without_copies(store, per_list.to_pandas()),
        _list_properties(store, test, popular),
        round_id,
    )
    stats = {"last_round": round_id, "test_lists": _digest(store, test)}
    return Outcome(rows_in=store.require("lists").rows, rows_out=len(per_list), stats=stats)


def _digest(store: RunDir, test: ListData) -> str:
    """The same for runs whose test lists are the same, in the same order with the same numbers of users and items."""
    found = hashlib.sha256()
    for values in (test.user_ids, test.item_ids, test.labels):
        found.update(np.ascontiguousarray(values.numpy()).tobytes())
    users = store.read("users", split="test", columns=["user_id", "raw_id"]).sort_by("user_id")
    for raw in (store.read("items", columns=["raw_id"])["raw_id"], users["raw_id"]):
        found.update("\n".join(map(str, raw.to_pylist())).encode())
    return found.hexdigest()[:16]


def _jobs(
    config: Config, todo: Sequence[tuple[str, int | str | None, int]]
) -> list[tuple[str, tuple[int | str | None, ...], int]]:
    """Fits as Ray tasks. Systems that share a fitted backbone are one task; else each is its own."""
    jobs: dict[tuple[str, int, object], list[int | str | None]] = {}
    for backbone, texts, seed in todo:
        apart = texts if config.reranker.of(backbone).knowledge == "input" else ""
        jobs.setdefault((backbone, seed, apart), []).append(texts)
    return [(backbone, tuple(texts), seed) for (backbone, seed, _), texts in jobs.items()]


def _fit_and_measure(
    shared: tuple[Config, RunDir, list[int | str | None]],
    backbone: str,
    wanted: tuple[int | str | None, ...],
    seed: int,
) -> None:
    """Fit the rerankers of one backbone and seed, measure them on the test lists, save them and commit their metrics."""
    config, store, texts = shared
    torch.set_num_threads(1)
    catalogue = read_catalogue(store)
    train, valid, test = (read_list_data(store, split) for split in ("train", "valid", "test"))
    # The same seed for every system, as systems are compared list by list.
    seed_number = seed_of(config.run.seed, "evaluate", seed)
    section = config.reranker.of(backbone)
    metrics = MetricsFile(store.path("per_list"), 0)
    device = "cuda" if config.evaluate.gpus_per_task else "cpu"
    rerankers = store.path("per_list") / "rerankers"

    def fitted(name: str, vectors: np.ndarray | None, plain: Reranker | None) -> KnowledgeFit:
        return fit_reranker(
            section.architecture,
            catalogue,
            train,
            valid,
            vectors,
            section.fit,
            seed=seed_number,
            backbone=plain,
            place=lambda model: model.to(device),
            on_epoch=lambda record: metrics.write({"model": name, **record}),
        )

    plain: Reranker | None = None
    without = fit_name(config, backbone, None, seed)
    if None not in wanted and section.knowledge != "input":
        if (rerankers / without / WEIGHTS_FILE).is_file():  # by an interrupted run
            plain = load_reranker(rerankers / without, catalogue).to(device)
        else:
            plain = fitted(without, None, None).model
    # The backbone first: the others stand on it.
    for one in sorted(wanted, key=lambda texts: texts is not None):
        name = fit_name(config, backbone, one, seed)
        vectors = None if one is None else knowledge_vectors(config, store, one)
        found = fitted(name, vectors, plain)
        if one is None:
            plain = found.model
        scores = _scores(config, store, ListScorer([found.model], catalogue), test, one, vectors)
        measured = _measured(store, test, scores, system_name(config, one), backbone, seed)
        stats = {
            "best epoch": found.result.best_epoch,
            "epochs": len(found.result.history),
            f"valid {section.metric}": found.result.best_value,
            **{f"test {name}": float(np.mean(measured[name].to_numpy())) for name in HEADLINE},
        }
        if seconds := [record["seconds"] for record in found.result.history]:
            stats["seconds per epoch"] = round(float(np.mean(seconds)), 2)
        if found.gain is not None:
            stats |= {GAIN: found.gain.with_texts - found.gain.without, USED: found.gain.kept}
        info = {
            "system": system_name(config, one),
            "seed": seed,
            "metrics": stats,
            "fit": {**section.fit.model_dump(), "seed": seed_number},
            **training_facts(config, store),
        }
        save_reranker(rerankers / name, found.model, info)
        store.write("per_list", measured, part=_part(config, texts, backbone, one, seed))
    metrics.flush()


def _scores(
    config: Config,
    store: RunDir,
    scorer: ListScorer,
    test: ListData,
    texts: int | str | None,
    vectors: np.ndarray | None,
) -> Iterator[Scores]:
    """Scores of the test lists by the users' first texts, then by their further ones, as many as there are.

    vectors: [U, D] of the first texts.
    """
    every = np.arange(len(test))
    users = test.user_rows.numpy()

    def scored(lists: np.ndarray, own: np.ndarray | None, rows: np.ndarray) -> Scores:
        some = test.select(torch.from_numpy(lists))
        return lists, scorer.score(some.item_ids, some.mask, own, rows, some.histories)

    yield scored(every, vectors, users)
    if vectors is None or not isinstance(texts, int):
        return
    for sample_id in range(1, config.test_texts):
        written, of_sample = read_vectors(store, texts, "user", sample_id)
        lists = np.flatnonzero(np.isin(users, written))
        if len(lists):
            yield scored(lists, of_sample, np.searchsorted(written, users[lists]))


def fit_name(config: Config, backbone: str, texts: int | str | None, seed: int) -> str:
    """The folder of a fitted reranker."""
    return f"{backbone}-{system_name(config, texts)}-seed{seed}"


def _part(
    config: Config, texts: Sequence[int | str | None], backbone: str, one: int | str | None, seed: int
) -> int:
    """The number of the file that a fit writes."""
    backbones = config.evaluated_backbones
    return (texts.index(one) * len(backbones) + backbones.index(backbone)) * config.evaluate.num_seeds + seed


def _simple_systems(config: Config, store: RunDir, test: ListData, popular: np.ndarray) -> pa.Table:
    """Random order, popularity among the training positives [n, L], and the labels themselves."""
    rng = np.random.default_rng(seed_of(config.run.seed, "random"))
    random = rng.random(test.item_ids.shape)
    systems = {"random": random, "popularity": popular, "upper-bound": test.labels.numpy()}
    return pa.concat_tables(
        [
            _measured(store, test, [(np.arange(len(test)), scores)], name, "none", 0)
            for name, scores in systems.items()
        ]
    )


def _measured(
    store: RunDir, test: ListData, every: Iterable[Scores], system: str, backbone: str, seed: int
) -> pa.Table:
    """every: by one text of each user after the other; a list's metrics are the means over them."""
    labels, mask = test.labels.numpy(), test.mask.numpy()
    times = np.zeros(len(test))
    sums = {name: np.zeros(len(test)) for name in METRIC_NAMES}
    for lists, scores in every:
        times[lists] += 1
        for name, values in list_metrics(scores, labels[lists], METRIC_NAMES, mask[lists]).items():
            sums[name][lists] += values
    columns: dict[str, Any] = {
        "list_id": _list_ids(store),
        "user_id": test.user_ids.numpy(),
        "system": [system] * len(test),
        "backbone": [backbone] * len(test),
        "seed": np.full(len(test), seed, np.int32),
    }
    return pa.table(columns | {name: values / times for name, values in sums.items()})


def _list_ids(store: RunDir) -> np.ndarray:
    return store.read("lists", split="test", columns=["split", "list_id"])["list_id"].to_numpy()


def _list_properties(store: RunDir, test: ListData, popular: np.ndarray) -> pd.DataFrame:
    """What the test lists are grouped by: length of the user's history, popularity [n, L] of the list's positives."""
    positive = test.labels.numpy() > 0
    hits = positive.sum(axis=1)
    histories = store.read("users", columns=["history_item_ids"])["history_item_ids"]
    lengths = np.array([len(history) for history in histories])
    return pd.DataFrame(
        {
            "list_id": _list_ids(store),
            "history_length": lengths[test.user_ids.numpy()],
            "popularity": np.divide(
                (popular * positive).sum(axis=1), hits, out=np.full(len(hits), np.nan), where=hits > 0
            ),
        }
    )


def _use_of_texts(config: Config, folder: Place, texts: Sequence[int | str | None]) -> list[dict[str, Any]]:
    """Per backbone and system with knowledge behind the backbone: fits, those that use the texts, and their mean gain."""
    found = []
    for backbone in config.evaluated_backbones:
        for one in texts:
            names = [fit_name(config, backbone, one, seed) for seed in range(config.evaluate.num_seeds)]
            cards = [read_card(folder / "rerankers" / name)["info"]["metrics"] for name in names]
            if all(USED in card for card in cards):
                row = {"fits": len(cards), "used": sum(card[USED] for card in cards)}
                gain = float(np.mean([card[GAIN] for card in cards]))
                found.append({"backbone": backbone, "system": system_name(config, one), **row, "gain": gain})
    return found


def _summarise(
    config: Config, store: RunDir, per_list: pd.DataFrame, about: pd.DataFrame, last_round: int
) -> None:
    """Write the tables, and metrics.json with the content of all of them, which the report reads."""
    # With logged lists or a sample of the users, the data is not the paper's.
    is_other_data = config.logged.file or config.data.max_users
    paper = None if is_other_data else paper_table.key_of(config.data.dataset, files_of_run(config, store))
    summary = tables.summarise(per_list, about, config.evaluate.num_resamples, paper)
    folder = store.path("per_list")
    summary["use_of_texts"] = _use_of_texts(config, folder, all_texts(config, last_round))
    for row in summary["use_of_texts"]:
        if row["used"] < row["fits"]:
            say(
                f"  {row['backbone']}, {row['system']}: in {row['fits'] - row['used']} of {row['fits']} fits validation shows no "
                f"gain of the texts ({row['gain']:+.4f} on average), and it ranks as its backbone"
            )
    write_json(folder / EVALUATION, summary)
    written = tables.write_tables(folder, summary)
    say(f"  tables in {folder}: {', '.join(file.name for file in written)}")


def read_evaluation(store: RunDir) -> dict[str, Any]:
    """The content of metrics.json. Raises UserError if the evaluation is not complete or its file is gone."""
    store.require("per_list")
    folder = store.path("per_list")
    file = next((folder / name for name in (EVALUATION, OLD_EVALUATION) if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder / EVALUATION} is missing; remove {folder} and run the recipe again")
    return json.loads(file.read_text(encoding="utf-8"))
