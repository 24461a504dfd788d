"""Metrics of every system on the test lists. No other stage reads these lists.

Each system is trained on the training lists with its own knowledge, has its epoch chosen on the validation lists, and is
measured on the same test lists: one Ray task per backbone, system and seed. Random order, popularity and the upper bound
are measured too (docs/method.md section 7). The tables are made in `dpo4rec_ray/evaluation/tables.py`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.evaluation import paper_table, tables
from dpo4rec_ray.evaluation.systems import BACKBONE, HEADLINE, METRIC_NAMES
from dpo4rec_ray.prepare.inspection import files_of_run
from dpo4rec_ray.rerankers import build_reranker
from dpo4rec_ray.rerankers.fit import ListData, fit, save_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.store.artifacts import RunDir, write_json
from dpo4rec_ray.store.metrics_file import METRICS, MetricsFile
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.store.reading import popularity, read_catalogue, read_list_data, read_vectors, training_facts
from dpo4rec_ray.workers.shards import resume_parts
from dpo4rec_ray.workers.tasks import run_tasks

EVALUATION, OLD_EVALUATION = "metrics.json", "figures.json"  # the former name
BASE_LLM, STATISTICS = "base-llm", "statistics"


def system_name(config: Config, knowledge: int | None) -> str:
    """Name of the system that uses the texts of round `knowledge`; None: no knowledge."""
    if knowledge is None:
        return BACKBONE
    if knowledge == 0:
        return STATISTICS if config.llm.source == "statistics" else BASE_LLM
    return f"dpo4rec-round{knowledge}"


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `per_list`: every system's metrics on every test list, the fitted rerankers, and the tables."""
    folder = store.path("per_list")
    finished = resume_parts(folder, store.fingerprint)
    # The slow ones first, so that no CPU waits at the end: fits with knowledge take longest.
    jobs = [
        (backbone, knowledge, seed)
        for knowledge in [*range(round_id, -1, -1), None]
        for backbone in config.evaluated_backbones
        for seed in range(config.evaluate.num_seeds)
    ]
    todo = [job for job in jobs if _part(config, *job) not in finished]
    if len(todo) < len(jobs):
        say(f"  evaluate: {len(jobs) - len(todo)} fits kept from an interrupted run")
    (folder / METRICS).unlink(missing_ok=True)
    run_tasks(
        _fit_and_measure,
        (config, store),
        todo,
        gpus=config.evaluate.gpus_per_task,
        label="evaluate",
        file=folder / METRICS,
        total=sum(config.reranker.of(backbone).epochs for backbone, _, _ in todo),
    )
    test, num_items = read_list_data(store, "test"), store.require("items").rows
    popular = popularity(read_list_data(store, "train"), num_items)[test.item_ids.numpy()]
    store.write("per_list", _simple_systems(config, store, test, popular), part=len(jobs))
    per_list = pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))])
    _summarise(config, store, per_list.to_pandas(), _list_properties(store, test, popular))
    return Outcome(
        rows_in=store.require("lists").rows, rows_out=len(per_list), stats={"last_round": round_id}
    )


def _fit_and_measure(shared: tuple[Config, RunDir], backbone: str, knowledge: int | None, seed: int) -> None:
    """Fit one reranker, measure it on the test lists, save it and commit its metrics."""
    config, store = shared
    torch.set_num_threads(1)
    catalogue = read_catalogue(store)
    train, valid, test = (read_list_data(store, split) for split in ("train", "valid", "test"))
    vectors = None if knowledge is None else read_vectors(store, knowledge, "user")[1]
    # The same seed for every system, as systems are compared list by list.
    seed_number = seed_of(config.run.seed, "evaluate", seed)
    section = config.reranker.of(backbone)
    model = build_reranker(section.architecture, catalogue.shape, vectors is not None, seed=seed_number)
    if config.evaluate.gpus_per_task:
        model = model.to("cuda")
    system = system_name(config, knowledge)
    metrics, name = MetricsFile(store.path("per_list"), 0), f"{backbone}-{system}-seed{seed}"
    result = fit(
        model,
        catalogue,
        train,
        valid,
        vectors,
        section.fit,
        seed=seed_number,
        on_epoch=lambda record: metrics.write({"model": name, **record}),
    )
    scores = ListScorer([model], catalogue).score(
        test.item_ids, test.mask, vectors, test.user_rows, test.histories
    )
    measured = _measured(store, test, scores, system, backbone, seed)
    stats = {
        "best epoch": result.best_epoch,
        "epochs": len(result.history),
        "seconds per epoch": round(float(np.mean([record["seconds"] for record in result.history])), 2),
        f"valid {section.metric}": result.best_value,
        **{f"test {name}": float(np.mean(measured[name].to_numpy())) for name in HEADLINE},
    }
    info = {
        "system": system,
        "seed": seed,
        "metrics": stats,
        "fit": {**section.fit.model_dump(), "seed": seed_number},
        **training_facts(config, store),
    }
    save_reranker(store.path("per_list") / "rerankers" / name, model, info)
    store.write("per_list", measured, part=_part(config, backbone, knowledge, seed))


def _part(config: Config, backbone: str, knowledge: int | None, seed: int) -> int:
    """The number of the file that a fit writes."""
    backbones = config.evaluated_backbones
    system = 0 if knowledge is None else knowledge + 1
    return (system * len(backbones) + backbones.index(backbone)) * config.evaluate.num_seeds + seed


def _simple_systems(config: Config, store: RunDir, test: ListData, popular: np.ndarray) -> pa.Table:
    """Random order, popularity among the training positives [n, L], and the labels themselves."""
    rng = np.random.default_rng(seed_of(config.run.seed, "random"))
    random = rng.random(test.item_ids.shape)
    systems = {"random": random, "popularity": popular, "upper-bound": test.labels.numpy()}
    return pa.concat_tables(
        [_measured(store, test, scores, name, "none", 0) for name, scores in systems.items()]
    )


def _measured(
    store: RunDir, test: ListData, scores: np.ndarray, system: str, backbone: str, seed: int
) -> pa.Table:
    columns: dict[str, Any] = {
        "list_id": _list_ids(store),
        "user_id": test.user_ids.numpy(),
        "system": [system] * len(test),
        "backbone": [backbone] * len(test),
        "seed": np.full(len(test), seed, np.int32),
    }
    return pa.table(columns | list_metrics(scores, test.labels.numpy(), METRIC_NAMES, test.mask.numpy()))


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


def _summarise(config: Config, store: RunDir, per_list: pd.DataFrame, about: pd.DataFrame) -> None:
    """Write the tables, and metrics.json with the content of all of them, which the report reads."""
    # With logged lists or a sample of the users, the data is not the paper's.
    is_other_data = config.logged.file or config.data.max_users
    paper = None if is_other_data else paper_table.key_of(config.data.dataset, files_of_run(config, store))
    summary = tables.summarise(per_list, about, config.evaluate.num_resamples, paper)
    folder = store.path("per_list")
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
