"""The reward rerankers: knowledge-augmented, one per fold, trained under Ray Train and chosen on validation users.

The same backbone without knowledge is trained beside them, with the same budget, to show what knowledge is worth.

Also measured here: the shuffle drop, the NDCG lost when users get each other's vectors. Zero means that the reranker
ignores knowledge, and then no reward can teach anything.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from dpo4rec_ray.artifacts import RunDir, write_json
from dpo4rec_ray.config import Config
from dpo4rec_ray.core.metrics import metric_by_name
from dpo4rec_ray.rerankers import build_reranker
from dpo4rec_ray.rerankers.fit import FitSettings, ListData, fit, load_reranker, save_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.stages.common import Outcome, say, seed_of
from dpo4rec_ray.stages.reading import read_catalogue, read_list_data, read_vectors, reranker_settings
from dpo4rec_ray.stages.training import MetricsFile, launch

PLAIN = "without-knowledge"


def fit_settings(config: Config, seed: int) -> FitSettings:
    """The same budget for every system and fold."""
    section = config.reranker
    return FitSettings(
        epochs=section.epochs,
        batch_size=section.batch_size,
        lr=section.lr,
        weight_decay=section.weight_decay,
        patience=section.patience,
        metric=section.metric,
        seed=seed,
        resample_negatives=section.resample_negatives,
    )


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write the reward rerankers, one folder per fold."""
    folder = store.start("reward")
    launch(
        train_loop,
        {"config": config, "store": store, "folder": str(folder)},
        folder=folder,
        num_workers=config.reward.num_workers,
        gpus_per_worker=config.reward.gpus_per_worker,
        label="train_reward",
        unit="epochs",
    )
    figures = _shuffle_drop(config, store)
    say(
        f"  NDCG@5 on validation: {figures['valid_ndcg@5 without knowledge']:.4f} without knowledge, "
        f"{figures['valid_ndcg@5']:.4f} with each user's text, {figures['shuffle_drop']:.4f} less with another user's"
    )
    num_lists = store.require("lists").rows
    return Outcome(rows_in=num_lists, rows_out=config.reward.num_folds + 1, figures=figures)


def train_loop(arguments: dict[str, Any]) -> None:
    """One worker: trains every fold together with the other workers, each on its share of the lists."""
    import torch
    from ray import train

    config, store, folder = arguments["config"], arguments["store"], arguments["folder"]
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    catalogue = read_catalogue(store)
    lists, valid = read_list_data(store, "train"), read_list_data(store, "valid")
    vectors = read_vectors(store, 0, "user")[1]
    folds = torch.from_numpy(store.read("users", columns=["fold"])["fold"].to_numpy().copy())
    metrics = MetricsFile(folder, rank)
    num_models = config.reward.num_folds + 1

    def train_one(number: int, name: str, share: ListData, knowledge: bool) -> None:
        seed = seed_of(config.run.seed, "reward", name)
        model = build_reranker(
            config.reranker.backbone, catalogue.shape, knowledge, reranker_settings(config), seed=seed
        )
        settings = fit_settings(config, seed)

        def on_epoch(record: dict[str, Any]) -> None:
            step = number * settings.epochs + record["epoch"]
            metrics.write({"step": step, "num_steps": num_models * settings.epochs, "model": name, **record})

        share = share.select(slice(rank, None, world))
        wrapped = train.torch.prepare_model(model)
        result = fit(
            wrapped, catalogue, share, valid, vectors if knowledge else None, settings, on_epoch=on_epoch
        )
        if rank == 0:
            info = {"best_epoch": result.best_epoch, "valid": result.best_value, "fit": asdict(settings)}
            save_reranker(f"{folder}/{name}", model, info)

    train_one(0, PLAIN, lists, knowledge=False)
    for fold in range(config.reward.num_folds):
        seen = lists.select(folds[lists.user_ids] != fold) if config.reward.num_folds > 1 else lists
        train_one(fold + 1, f"fold-{fold}", seen, knowledge=True)


def _shuffle_drop(config: Config, store: RunDir) -> dict[str, Any]:
    """NDCG@5 on validation lists with own vectors, and what is lost when each user gets another user's."""
    catalogue, valid = read_catalogue(store), read_list_data(store, "valid")
    vectors = read_vectors(store, 0, "user")[1]
    users = np.unique(valid.user_ids.numpy())
    other = np.arange(len(vectors))
    other[users] = np.roll(np.random.default_rng(seed_of(config.run.seed, "shuffle")).permutation(users), 1)[
        np.argsort(np.argsort(users))
    ]
    metric = metric_by_name("ndcg@5")
    labels, mask = valid.labels.numpy(), valid.mask.numpy()
    values = {}
    plain = ListScorer([load_reranker(store.path("reward") / PLAIN, catalogue)], catalogue)
    values["plain"] = float(metric(plain.score(valid.item_ids, mask), labels, mask).mean())
    scorer = ListScorer(
        [
            load_reranker(store.path("reward") / f"fold-{fold}", catalogue)
            for fold in range(config.reward.num_folds)
        ],
        catalogue,
    )
    for name, source in (("own", vectors), ("other", vectors[other])):
        values[name] = float(
            metric(scorer.score(valid.item_ids, mask, source, valid.user_rows), labels, mask).mean()
        )
    figures = {
        "valid_ndcg@5": values["own"],
        "valid_ndcg@5 without knowledge": values["plain"],
        "shuffle_drop": values["own"] - values["other"],
    }
    write_json(store.path("reward") / "diagnosis.json", figures)
    return figures
