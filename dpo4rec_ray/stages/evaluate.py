"""Final figures. The only stage that reads the test users' lists.

Each system is fitted on the training lists with its own knowledge, chosen on validation, and measured on the same test
lists: one Ray task per system and seed. Random, popularity and the upper bound stand beside them (method.md section 7).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from dpo4rec_ray.artifacts import RunDir
from dpo4rec_ray.config import Config
from dpo4rec_ray.core.metrics import METRICS, metric_by_name, paired_bootstrap
from dpo4rec_ray.rerankers import build_reranker
from dpo4rec_ray.rerankers.fit import ListData, fit, save_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.stages.common import WORKER_ENV, Outcome, Progress, seed_of
from dpo4rec_ray.stages.reading import read_catalogue, read_list_data, read_vectors, reranker_settings
from dpo4rec_ray.stages.train_reward import fit_settings

METRIC_NAMES = tuple(f"{name}@5" for name in METRICS)
BACKBONE, BASE_LLM = "backbone", "base-llm"


def round_system(round_id: int) -> str:
    """Name of the system that uses round `round_id`'s knowledge."""
    return f"dpo4rec-round{round_id}" if round_id else BASE_LLM


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `per_list`: every system's metrics on every test list, and the fitted rerankers."""
    import ray

    folder = store.start("per_list")
    remote = ray.remote(
        num_cpus=1,
        num_gpus=config.evaluate.gpus_per_task,
        runtime_env={"env_vars": WORKER_ENV},
    )
    task = remote(_fit_and_measure)
    jobs = [
        (knowledge, seed)
        for seed in range(config.evaluate.num_seeds)
        for knowledge in [None, *range(round_id + 1)]
    ]
    waiting = [task.remote(config, store, str(folder), knowledge, seed) for knowledge, seed in jobs]
    waiting.append(remote(_simple_systems).remote(config, store))
    tables: list[pa.Table] = []
    with Progress("evaluate", len(waiting), "fits") as progress:
        while waiting:
            done, waiting = ray.wait(waiting)
            tables += ray.get(done)
            progress.at(len(tables))
    table = pa.concat_tables(tables).sort_by(
        [("system", "ascending"), ("seed", "ascending"), ("list_id", "ascending")]
    )
    store.write("per_list", table)
    return Outcome(rows_in=store.require("lists").rows, rows_out=len(table), figures={"last_round": round_id})


def _fit_and_measure(
    config: Config, store: RunDir, folder: str, knowledge: int | None, seed: int
) -> pa.Table:
    """Fit one reranker and measure it on the test lists. `knowledge`: the round whose texts it uses, None for none."""
    catalogue = read_catalogue(store)
    train, valid, test = (read_list_data(store, split) for split in ("train", "valid", "test"))
    vectors = None if knowledge is None else read_vectors(store, knowledge, "user")[1]
    seed_number = seed_of(config.run.seed, "evaluate", seed)  # the same for every system: paired comparison
    model = build_reranker(
        config.reranker.backbone,
        catalogue.shape,
        vectors is not None,
        reranker_settings(config),
        seed=seed_number,
    )
    result = fit(model, catalogue, train, valid, vectors, fit_settings(config, seed_number))
    system = BACKBONE if knowledge is None else round_system(knowledge)
    info = {"system": system, "seed": seed, "best_epoch": result.best_epoch, "valid": result.best_value}
    save_reranker(f"{folder}/rerankers/{system}-seed{seed}", model, info)
    scores = ListScorer([model], catalogue).score(test.item_ids, test.mask, vectors, test.user_rows)
    return _measured(store, test, scores, system, config.reranker.backbone, seed)


def _simple_systems(config: Config, store: RunDir) -> pa.Table:
    """Random order, popularity among the training positives, and the labels themselves."""
    train, test = read_list_data(store, "train"), read_list_data(store, "test")
    positives = train.item_ids[train.labels > 0].numpy()
    popularity = np.bincount(positives, minlength=store.require("items").rows).astype(np.float64)
    rng = np.random.default_rng(seed_of(config.run.seed, "random"))
    systems = {
        "random": rng.random(test.item_ids.shape),
        "popularity": popularity[test.item_ids.numpy()],
        "upper-bound": test.labels.numpy(),
    }
    return pa.concat_tables(
        [_measured(store, test, scores, name, "none", 0) for name, scores in systems.items()]
    )


def _measured(
    store: RunDir, test: ListData, scores: np.ndarray, system: str, backbone: str, seed: int
) -> pa.Table:
    labels, mask = test.labels.numpy(), test.mask.numpy()
    list_ids = store.read("lists", split="test", columns=["split", "list_id"])["list_id"].to_numpy()
    columns: dict[str, Any] = {
        "list_id": list_ids,
        "user_id": test.user_ids.numpy(),
        "system": [system] * len(test),
        "backbone": [backbone] * len(test),
        "seed": np.full(len(test), seed, np.int32),
    }
    columns |= {name: metric_by_name(name)(scores, labels, mask).astype(np.float32) for name in METRIC_NAMES}
    return pa.table(columns)


def evaluation_rows(per_list: pa.Table) -> list[dict[str, Any]]:
    """One row per system, backbone and seed: means over lists, over users, and over lists with a positive (ceiling)."""
    frame = per_list.to_pandas()
    best = frame[frame["system"] == "upper-bound"]
    with_positive = set(best[best["ndcg@5"] > 0]["list_id"])
    rows: list[dict[str, Any]] = []
    for (system, backbone, seed), group in frame.groupby(["system", "backbone", "seed"], sort=False):
        row: dict[str, Any] = {
            "system": system,
            "backbone": backbone,
            "seed": int(seed),
            "num_lists": len(group),
        }
        row |= {name: float(group[name].mean()) for name in METRIC_NAMES}
        per_user = group.groupby("user_id")[list(METRIC_NAMES)].mean()
        row |= {f"{name} by user": float(per_user[name].mean()) for name in METRIC_NAMES}
        reachable = group[group["list_id"].isin(with_positive)]
        row |= {f"{name} on lists with a positive": float(reachable[name].mean()) for name in METRIC_NAMES}
        rows.append(row)
    return rows


def comparisons(per_list: pa.Table, num_resamples: int) -> list[dict[str, Any]]:
    """NDCG@5 of each knowledge system minus the backbone's and minus the base LLM's, on identical lists and seeds."""
    frame = per_list.to_pandas().set_index(["seed", "list_id"]).sort_index()
    systems = [name for name in frame["system"].unique() if name == BASE_LLM or name.startswith("dpo4rec")]
    found: list[dict[str, Any]] = []
    for system in sorted(systems):
        for other in (BACKBONE, BASE_LLM):
            if other == system:
                continue
            mine, theirs = frame[frame["system"] == system], frame[frame["system"] == other]
            for name in METRIC_NAMES:
                delta = (mine[name] - theirs[name]).to_numpy()
                interval = paired_bootstrap(delta, mine["user_id"].to_numpy(), num_resamples)
                found.append(
                    {
                        "system": system,
                        "against": other,
                        "metric": name,
                        "delta": interval.mean,
                        "ci95": [interval.low, interval.high],
                    }
                )
    return found
