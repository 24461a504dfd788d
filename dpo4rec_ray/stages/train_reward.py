"""Trains the reward rerankers: with knowledge, one per fold of users, each with its epoch chosen on validation users.

The same backbone without knowledge is trained with the same settings, to show what knowledge adds. The models are small, so
each is a Ray task of its own. With reward.num_workers > 1 they are trained one after the other, each by that many workers
under Ray Train, for models or data that are too large for one worker.

Also measures the shuffle drop: the NDCG that is lost when users get each other's vectors. Zero means that the rerankers
ignore knowledge, and then their rewards are noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.training import TrainerSection
from dpo4rec_ray.core.intervals import paired_bootstrap
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers import Reranker, build_reranker
from dpo4rec_ray.rerankers.fit import ListData, fit, load_reranker, save_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.store.artifacts import RunDir, write_json
from dpo4rec_ray.store.metrics_file import METRICS, MetricsFile
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.store.reading import fold_names, read_catalogue, read_list_data, read_vectors, training_facts
from dpo4rec_ray.train.launch import launch
from dpo4rec_ray.workers.tasks import run_tasks

PLAIN = "without-knowledge"


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write the reward rerankers, one folder per fold."""
    folder = store.start("reward")
    names = [PLAIN, *fold_names(config)]
    if config.reward.num_workers > 1:
        launch(
            train_loop,
            {"config": config, "store": store, "names": names},
            folder=folder,
            section=TrainerSection(
                num_workers=config.reward.num_workers,
                gpus_per_worker=config.reward.gpus_per_worker,
                max_failures=0,  # no checkpoints: a retry would start from the beginning
            ),
            label="train_reward",
            unit="epochs",
        )
    else:
        run_tasks(
            _train_task,
            (config, store),
            [(name, len(names)) for name in names],
            gpus=config.reward.gpus_per_worker,
            label="train_reward",
            file=folder / METRICS,
            total=len(names) * config.reranker.of(config.reranker.backbone).epochs,
        )
    stats = _shuffle_drop(config, store)
    say(
        f"  NDCG@5 on validation: {stats['valid_ndcg@5 without knowledge']:.4f} without knowledge, "
        f"{stats['valid_ndcg@5']:.4f} with each user's text, {stats['shuffle_drop']:.4f} "
        "[{:.4f}, {:.4f}] less with another user's".format(*stats["shuffle_drop_ci95"])
    )
    return Outcome(rows_in=store.require("lists").rows, rows_out=len(names), stats=stats)


def _train_task(shared: tuple[Config, RunDir], name: str, num_models: int) -> None:
    """A Ray task: trains one reranker by itself."""
    config, store = shared
    torch.set_num_threads(1)
    device = "cuda" if config.reward.gpus_per_worker else "cpu"
    _train_one(config, store, name, MetricsFile(store.path("reward"), 0), num_models, lambda m: m.to(device))


def train_loop(arguments: dict[str, Any]) -> None:
    """One Ray Train worker: trains every reranker together with the other workers, on its share of the lists."""
    from ray import train

    config, store, names = arguments["config"], arguments["store"], arguments["names"]
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    metrics = MetricsFile(store.path("reward"), rank)
    for name in names:
        _train_one(config, store, name, metrics, len(names), train.torch.prepare_model, rank, world)


def _train_one(
    config: Config,
    store: RunDir,
    name: str,
    metrics: MetricsFile,
    num_models: int,
    place: Callable[[Reranker], Any],
    rank: int = 0,
    world: int = 1,
) -> None:
    """Train the reranker of one fold (or the one without knowledge) on this rank's share of its lists, and save it."""
    number = [PLAIN, *fold_names(config)].index(name)  # 0: without knowledge; n: of fold n - 1
    knowledge = name != PLAIN
    catalogue = read_catalogue(store)
    lists, valid = read_list_data(store, "train"), read_list_data(store, "valid")
    if knowledge and config.reward.num_folds > 1:
        folds = torch.from_numpy(store.read("users", columns=["fold"])["fold"].to_numpy().copy())
        lists, valid = without_fold(lists, folds, number - 1), without_fold(valid, folds, number - 1)
    section = config.reranker.of(config.reranker.backbone)
    seed = seed_of(config.run.seed, "reward", name)

    def on_epoch(record: dict[str, Any]) -> None:
        step = number * section.epochs + record["epoch"]
        metrics.write({"step": step, "num_steps": num_models * section.epochs, "model": name, **record})

    model = place(build_reranker(section.architecture, catalogue.shape, knowledge, seed=seed))
    result = fit(
        model,
        catalogue,
        lists.select(slice(rank, None, world)),
        valid,
        read_vectors(store, 0, "user")[1] if knowledge else None,
        section.fit,
        seed=seed,
        on_epoch=on_epoch,
    )
    if rank == 0:
        info = {
            "system": name,
            "seed": seed,
            "metrics": {"best_epoch": result.best_epoch, f"valid {section.metric}": result.best_value},
            "fit": {**section.fit.model_dump(), "seed": seed},
            **training_facts(config, store),
        }
        save_reranker(store.path("reward") / name, model, info)


def without_fold(lists: ListData, folds: torch.Tensor, fold: int) -> ListData:
    """The lists of users outside the fold, for training and for choosing the epoch. folds: [U] of each user.

    Raises:
        UserError: no list is left.
    """
    kept = lists.select(folds[lists.user_ids] != fold)
    if not len(kept):
        raise UserError(
            f"all lists of a split are of users of fold {fold}; use more users, a larger data.valid_frac or fewer "
            "reward.num_folds"
        )
    return kept


def another_user(users: np.ndarray, num_users: int, seed: int) -> np.ndarray:
    """[num_users]: another one of `users` for each of them (at least two); all other users stay themselves."""
    other = np.arange(num_users)
    order = np.random.default_rng(seed).permutation(users)
    other[order] = np.roll(order, 1)
    return other


def _shuffle_drop(config: Config, store: RunDir) -> dict[str, Any]:
    """NDCG@5 on validation lists with each user's own vector, and what is lost with another user's.

    The folds' rerankers are measured one by one and the mean is reported. An ensemble of them would score higher for
    being an ensemble, which is unfair to the single reranker without knowledge.
    """
    catalogue, valid = read_catalogue(store), read_list_data(store, "valid")
    vectors = read_vectors(store, 0, "user")[1]
    other = another_user(np.unique(valid.user_ids.numpy()), len(vectors), seed_of(config.run.seed, "shuffle"))
    labels, mask = valid.labels.numpy(), valid.mask.numpy()

    def measured(names: list[str], source: np.ndarray | None) -> np.ndarray:
        """[n] mean over the rerankers."""
        found = []
        for name in names:
            scorer = ListScorer([load_reranker(store.path("reward") / name, catalogue)], catalogue)
            scores = scorer.score(valid.item_ids, mask, source, valid.user_rows, valid.histories)
            found.append(list_metrics(scores, labels, ["ndcg@5"], mask)["ndcg@5"])
        return np.mean(found, axis=0)

    folds = fold_names(config)
    own = measured(folds, vectors)
    drop = paired_bootstrap(own - measured(folds, vectors[other]), valid.user_ids.numpy())
    stats = {
        "valid_ndcg@5": float(own.mean()),
        "valid_ndcg@5 without knowledge": float(measured([PLAIN], None).mean()),
        "shuffle_drop": drop.mean,
        "shuffle_drop_ci95": [drop.low, drop.high],
    }
    write_json(store.path("reward") / "diagnosis.json", stats)
    return stats
