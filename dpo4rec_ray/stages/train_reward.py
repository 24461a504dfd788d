"""Trains the reward rerankers: one per fold of users, each with its epoch chosen on validation users.

They learn to read from the texts that reward.reader names. The same backbone without knowledge is trained on the same users with
the same settings, to show what knowledge adds. The models are small, so each fold is a Ray task of its own. With
reward.num_workers > 1 folds are trained one after the other, each by that many workers under Ray Train, for models or data
that are too large for one worker.

Also measures the shuffle drop: the NDCG that is lost when users get each other's vectors. Zero means that the rerankers
ignore knowledge, and then their rewards are noise. And the channel: what the rerankers gain from texts of each kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

import numpy as np
import torch

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.intervals import Interval, paired_bootstrap
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers import Reranker
from dpo4rec_ray.rerankers.card import read_card
from dpo4rec_ray.rerankers.fit import ListData, load_reranker, save_reranker
from dpo4rec_ray.rerankers.fit_knowledge import KnowledgeFit, fit_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.store.artifacts import RunDir, write_json
from dpo4rec_ray.store.metrics_file import MetricsFile
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.store.reading import (
    fold_names,
    knowledge_vectors,
    read_all_vectors,
    read_catalogue,
    read_list_data,
    reader_vectors,
    training_facts,
)
from dpo4rec_ray.train.launch import launch
from dpo4rec_ray.workers.stage_workers import reward_tasks, reward_trainer
from dpo4rec_ray.workers.tasks import run_tasks

# Beside each fold's reranker: the same backbone without knowledge, trained on the same users.
PLAIN = "without-knowledge"


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write the reward rerankers, one folder per fold.

    round_id: 0, or the turn for which they are trained anew, on the texts of the policy that it begins with.
    """
    folder = store.start("reward", round_id)
    names = fold_names(config)
    if config.reward.num_workers > 1:
        launch(
            train_loop,
            {"config": config, "store": store, "names": names, "round_id": round_id},
            folder=folder,
            section=reward_trainer(config),
            label="train_reward",
            unit="epochs",
        )
    else:
        run_tasks(
            _train_task,
            (config, store, round_id),
            [(name, len(names)) for name in names],
            workers=reward_tasks(config),
            label="train_reward",
            folder=folder,
            total=len(names) * _epochs(config),
        )
    stats = _diagnosis(config, store, round_id)
    for line in _lines(config, stats):
        say(f"  {line}")
    return Outcome(rows_in=store.require("lists").rows, rows_out=len(names), stats=stats)


def _epochs(config: Config) -> int:
    """Epochs of a fold: of a reranker without texts and one that reads."""
    return config.reranker.of(config.reranker.backbone).total_epochs(1, 1)


def _train_task(shared: tuple[Config, RunDir, int], name: str, num_models: int) -> None:
    """A Ray task: trains one reranker by itself."""
    config, store, round_id = shared
    torch.set_num_threads(1)
    device = "cuda" if config.reward.gpus_per_worker else "cpu"
    metrics = MetricsFile(store.path("reward", round_id), 0)
    _train_one(config, store, round_id, name, metrics, num_models, lambda m: m.to(device))
    metrics.flush()


def train_loop(arguments: dict[str, Any]) -> None:
    """One Ray Train worker: trains every reranker together with the other workers, on its share of the lists."""
    from ray import train

    config, store, names = arguments["config"], arguments["store"], arguments["names"]
    round_id = arguments["round_id"]
    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    metrics = MetricsFile(store.path("reward", round_id), rank)
    for name in names:
        _train_one(config, store, round_id, name, metrics, len(names), train.torch.prepare_model, rank, world)
    metrics.flush()


def _train_one(
    config: Config,
    store: RunDir,
    round_id: int,
    name: str,
    metrics: MetricsFile,
    num_models: int,
    place: Callable[[Reranker], Any],
    rank: int = 0,
    world: int = 1,
) -> None:
    """Train the rerankers of one fold on this rank's share of its lists, and save them."""
    number = fold_names(config).index(name)
    catalogue = read_catalogue(store)
    lists, valid = read_list_data(store, "train"), read_list_data(store, "valid")
    if config.reward.num_folds > 1:
        folds = torch.from_numpy(store.read("users", columns=["fold"])["fold"].to_numpy().copy())
        lists, valid = without_fold(lists, folds, number), without_fold(valid, folds, number)
    section = config.reranker.of(config.reranker.backbone)
    seed = seed_of(config.run.seed, "reward", name)
    step = itertools.count(number * _epochs(config) + 1)

    def on_epoch(record: dict[str, Any]) -> None:
        metrics.write(
            {"step": next(step), "num_steps": num_models * _epochs(config), "model": name, **record}
        )

    def fitted(vectors: np.ndarray | None, backbone: Reranker | None) -> KnowledgeFit:
        return fit_reranker(
            section.architecture,
            catalogue,
            lists,
            valid,
            vectors,
            section.fit,
            seed=seed,
            backbone=backbone,
            place=place,
            share=slice(rank, None, world),
            on_epoch=on_epoch,
        )

    plain = fitted(None, None)
    reading = fitted(reader_vectors(config, store, policy_read(round_id)), plain.model)
    if rank != 0:
        return
    channel = {}
    if section.knowledge == "regression":  # in closed form: another kind of texts costs a second
        for kind, vectors in _kinds(config, store, policy_read(round_id)).items():
            gain = fitted(vectors, plain.model).gain
            assert gain is not None
            channel[kind] = [gain.with_texts - gain.without, gain.std_error]
    for folder, found in ((PLAIN, plain), ("", reading)):
        info = {
            "system": f"{name} {folder}".strip(),
            "seed": seed,
            "metrics": {
                "best_epoch": found.result.best_epoch,
                f"valid {section.metric}": found.result.best_value,
                **({"channel": channel} if found is reading else {}),
            },
            "fit": {**section.fit.model_dump(), "seed": seed},
            **training_facts(config, store),
        }
        save_reranker(store.path("reward", round_id) / name / folder, found.model, info)


def policy_read(round_id: int) -> int:
    """The policy whose texts rerankers are trained on for a turn: the last one before it."""
    return max(0, round_id - 1)


def _kinds(config: Config, store: RunDir, policy: int) -> dict[str, np.ndarray]:
    """Vectors [U, D] of each kind of text whose worth to the reward's rerankers is measured, by its name in the figures."""
    kinds: dict[str, int | str] = {
        config.llm.source: policy,
        **{name: name for name in config.evaluate.references},
    }
    found = {name: knowledge_vectors(config, store, texts) for name, texts in kinds.items()}
    if "oracle" in config.counted_texts:
        found["oracle"] = read_all_vectors(store, "oracle")[:, 0]
    return found


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


def _diagnosis(config: Config, store: RunDir, round_id: int) -> dict[str, Any]:
    """NDCG@5 on validation lists without texts, with the reader's texts, and what is lost with another user's; the same loss for
    the LLM's own texts; and the channel.

    The folds' rerankers are measured one by one and the mean is reported. An ensemble of them would score higher for
    being an ensemble, which is unfair to the single reranker without knowledge.
    """
    catalogue, valid = read_catalogue(store), read_list_data(store, "valid")
    users = np.unique(valid.user_ids.numpy())
    labels, mask = valid.labels.numpy(), valid.mask.numpy()
    folder = store.path("reward", round_id)
    cards = [read_card(folder / name)["info"]["metrics"] for name in fold_names(config)]
    scorers = {
        kind: [
            ListScorer([load_reranker(folder / name / kind, catalogue)], catalogue)
            for name in fold_names(config)
        ]
        for kind in (PLAIN, "")
    }

    def measured(kind: str, vectors: np.ndarray | None) -> np.ndarray:
        """[n] mean over the rerankers."""
        found = []
        for scorer in scorers[kind]:
            scores = scorer.score(valid.item_ids, mask, vectors, valid.user_rows, valid.histories)
            found.append(list_metrics(scores, labels, ["ndcg@5"], mask)["ndcg@5"])
        return np.mean(found, axis=0)

    def shuffle_drop(vectors: np.ndarray) -> tuple[np.ndarray, Interval]:
        own = measured("", vectors)
        other = another_user(users, len(vectors), seed_of(config.run.seed, "shuffle"))
        return own, paired_bootstrap(own - measured("", vectors[other]), valid.user_ids.numpy())

    own, drop = shuffle_drop(reader_vectors(config, store, policy_read(round_id))[:, 0])
    stats: dict[str, Any] = {
        "reader": list(config.reward.reader),
        "valid_ndcg@5": float(own.mean()),
        "valid_ndcg@5 without knowledge": float(measured(PLAIN, None).mean()),
        "shuffle_drop": drop.mean,
        "shuffle_drop_ci95": [drop.low, drop.high],
    }
    if config.reward.reader[0] != "llm":
        _, drop = shuffle_drop(knowledge_vectors(config, store, policy_read(round_id)))
        stats |= {"shuffle_drop_llm": drop.mean, "shuffle_drop_llm_ci95": [drop.low, drop.high]}
    kinds = cards[0].get("channel", {})
    stats["channel"] = {
        kind: {
            "gain": mean(card["channel"][kind][0] for card in cards),
            "std_error": mean(card["channel"][kind][1] for card in cards),
        }
        for kind in kinds
    }
    stats["channel_metric"] = config.reranker.of(config.reranker.backbone).metric
    write_json(folder / "diagnosis.json", stats)
    return stats


def _lines(config: Config, stats: dict[str, Any]) -> Iterator[str]:
    low, high = stats["shuffle_drop_ci95"]
    yield (
        f"NDCG@5 on validation, mean over the folds: {stats['valid_ndcg@5 without knowledge']:.4f} without knowledge, "
        f"{stats['valid_ndcg@5']:.4f} with each user's text ({' and '.join(stats['reader'])}), {stats['shuffle_drop']:.4f} "
        f"[{low:.4f}, {high:.4f}] less with another user's"
    )
    if "shuffle_drop_llm" in stats:
        low, high = stats["shuffle_drop_llm_ci95"]
        yield f"the LLM's own texts: {stats['shuffle_drop_llm']:.4f} [{low:.4f}, {high:.4f}] less with another user's"
    if stats["channel"]:
        gains = [
            f"{kind} {one['gain']:+.4f} (se {one['std_error']:.4f})" for kind, one in stats["channel"].items()
        ]
        metric = stats["channel_metric"].upper()
        yield f"channel, gain of {metric} on validation where the rerankers are trained on such texts: {', '.join(gains)}"


def check_reads(config: Config, store: RunDir, round_id: int) -> None:
    """Raises UserError if the rerankers that score a turn do not read, so that an LLM would be trained on noise."""
    trained_for = config.run.reward_of(round_id)
    reward = store.manifest("reward", trained_for)
    if reward is None or not (config.has_policy and config.reward.must_read):
        return  # a single stage that needs no rewards, or no LLM to train
    low, high = reward.stats["shuffle_drop_ci95"]
    if low is None or not low > 0:  # null: one validation user has no interval
        interval = "unknown" if low is None else f"[{low:.4f}, {high:.4f}]"
        again = (
            f"; run.retrain_reward trained them for round {config.run.round_of(round_id)}"
            if trained_for
            else ""
        )
        raise UserError(
            f"the reward's rerankers do not read{again}: with another user's text they rank as well (NDCG@5 lost: 95 % interval "
            f'{interval}), so the rewards would be noise; use more users, reward.reader = ["statistics"], more item attributes, '
            "or set reward.must_read = false to go on all the same"
        )
