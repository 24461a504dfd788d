"""Artifacts in the form that rerankers need: catalogue, lists and vectors as arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers.catalogue import Catalogue, Histories
from dpo4rec_ray.rerankers.fit import ListData, load_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.rerankers.text_rewards import SampleScorer
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.versions import commit, versions

WRITERS = {"knowledge": "encode", "references": "references"}  # artifact -> its stage
_LIST_COLUMNS = ["user_id", "split", "candidate_item_ids", "labels", "history_item_ids", "history_ratings"]


def read_vectors(
    store: RunDir, round_id: int, subject: str, sample_id: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [S] of the subjects ("user" or "item") that have such a text of one round, all have the first; its vectors [S, D]; in
    id order.
    """
    where = [("subject", "=", subject), ("sample_id", "=", sample_id)]
    table = store.read("knowledge", round_id, where=where, columns=["subject_id", "vector"])
    table = table.sort_by("subject_id").combine_chunks()
    return table["subject_id"].to_numpy(), vectors_of(table["vector"])


def read_all_vectors(store: RunDir, subject: str, round_id: int = 0) -> np.ndarray:
    """The vectors [U, K, D] of all texts of a subject ("user", of a policy; "statistics", "oracle"), row u is user id u.

    K is the most that a user has; one who has fewer has them again, one without any has zeros.
    """
    where, artifact = [("subject", "=", subject)], "knowledge" if subject == "user" else "references"
    table = store.read(artifact, round_id, where=where, columns=["subject_id", "sample_id", "vector"])
    table = table.sort_by([("subject_id", "ascending"), ("sample_id", "ascending")]).combine_chunks()
    if not len(table):
        raise UserError(
            f"{store.path(artifact, round_id)} has no texts of '{subject}'; run the recipe with --from {WRITERS[artifact]}"
        )
    users, vectors = table["subject_id"].to_numpy(), vectors_of(table["vector"])
    known, starts, counts = np.unique(users, return_index=True, return_counts=True)
    found = np.zeros((store.require("users").rows, counts.max(), vectors.shape[1]), np.float32)
    for place in range(found.shape[1]):
        found[known, place] = vectors[starts + place % counts]
    return found


def knowledge_vectors(config: Config, store: RunDir, texts: int | str) -> np.ndarray:
    """The vectors [U, D] that a system ranks with: of a round's texts, or of a reference in evaluate.references."""
    if isinstance(texts, int):
        return read_vectors(store, texts, "user")[1]
    vectors = read_all_vectors(store, _subject(config, "statistics"))[:, 0]
    if texts == "statistics":
        return vectors
    order = np.random.default_rng(seed_of(config.run.seed, "random texts")).permutation(len(vectors))
    mixed = np.empty_like(vectors)
    mixed[order] = vectors[np.roll(order, 1)]  # everybody has another user's
    return mixed


def reader_vectors(config: Config, store: RunDir, policy: int) -> np.ndarray:
    """The vectors [U, K, D] that the reward's rerankers are trained on, reward.reader_texts of each of reward.reader.

    policy: the one that wrote the LLM's. After a round it wrote one text per training user, which is there several times then.
    """
    most = config.reward.reader_texts
    found = [
        read_all_vectors(store, _subject(config, name), policy)[:, :most] for name in config.reward.reader
    ]
    return np.concatenate(found, axis=1)


def _subject(config: Config, reader: str) -> str:
    """Whose texts in `knowledge` a reader means."""
    return reader if reader != "llm" and config.llm.source != reader else "user"


def without_copies(store: RunDir, per_list: pd.DataFrame) -> pd.DataFrame:
    """The rows of users themselves, without those that data.drift_windows writes once more for each window."""
    made = store.manifest("lists")
    copies_from = made.stats.get("refreshed_from") if made else None
    return per_list if copies_from is None else per_list[per_list["user_id"] < copies_from]


def vectors_of(column: pa.ChunkedArray) -> np.ndarray:
    """A list column of equal lengths as [n, D] float32; [0, 0] of no rows, whose length nobody knows."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return flat.reshape(len(column), -1 if len(column) else 0)


def read_catalogue(store: RunDir) -> Catalogue:
    """All items with the vectors of their texts."""
    attributes = store.read("items", columns=["attributes"])["attributes"].to_pylist()
    return Catalogue.from_items(attributes, read_vectors(store, 0, "item")[1])


def read_list_data(store: RunDir, split: str | tuple[str, ...]) -> ListData:
    """Lists of a split as dense tensors; the row of a user's vector is the user id."""
    return list_data(store.read("lists", split=split, columns=_LIST_COLUMNS))


def list_data(table: pa.Table) -> ListData:
    """Rows of the lists artifact as dense tensors.

    Raises:
        UserError: a list has other numbers of candidates and labels, or of history items and ratings.
    """
    item_ids, mask = dense(table["candidate_item_ids"], np.int64)
    labels, labelled = dense(table["labels"], np.float32)
    history_ids, history_mask = dense(table["history_item_ids"], np.int64)
    history_ratings, rated = dense(table["history_ratings"], np.float32)
    if not np.array_equal(mask, labelled) or not np.array_equal(history_mask, rated):
        raise UserError(
            "lists: item ids and their labels or ratings differ in length; run the stage prepare again"
        )
    users = torch.from_numpy(table["user_id"].to_numpy().copy())
    histories = Histories(*map(torch.from_numpy, (history_ids, history_mask, history_ratings)))
    return ListData(*map(torch.from_numpy, (item_ids, labels, mask)), users, users, histories)


def dense(column: pa.ChunkedArray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """A list column as values [n, longest] with 0 at padding, and a mask [n, longest] of the real places."""
    lengths = pc.list_value_length(column).to_numpy()
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    values = np.zeros(mask.shape, dtype)
    values[mask] = pc.list_flatten(column).to_numpy()
    return values, mask


def fold_names(config: Config) -> list[str]:
    """Names of the reward rerankers, one per fold: folders of `reward`."""
    return [f"fold-{fold}" for fold in range(config.reward.num_folds)]


def sample_scorer(config: Config, store: RunDir, metrics: Sequence[str], reward: int = 0) -> SampleScorer:
    """The reward rerankers with the lists of the training and validation users.

    reward: its number (`RunSection.reward_of`).
    A user's texts are scored on the lists of the user's own split alone: where lists are split by time, the later lists of
    a training user must not decide which pairs are trained on.
    """
    table = store.read("lists", split=("train", "valid"), columns=_LIST_COLUMNS)
    users = store.read("users", columns=["user_id", "split", "fold"])  # in user id order
    own_split = users["split"].take(table["user_id"])
    catalogue = read_catalogue(store)
    folder = store.path("reward", reward)
    scorers = [
        ListScorer([load_reranker(folder / name, catalogue)], catalogue) for name in fold_names(config)
    ]
    weights = None
    if config.reward.hard_negatives:
        seen = list_data(table.filter(pc.equal(table["split"], "train")))
        # Plus one: an item without a positive may be drawn too.
        counts = popularity(seen, catalogue.shape.num_items) + 1
        weights = counts**config.reward.hard_negatives
    return SampleScorer(
        scorers,
        list_data(table.filter(pc.equal(table["split"], own_split))),
        users["fold"].to_numpy(),
        num_items=catalogue.shape.num_items,
        metrics=metrics,
        num_redraws=config.reward.num_redraws,
        seed=seed_of(config.run.seed, "redraws"),
        negative_weights=weights,
        splits=np.asarray(users["split"]),
    )


def popularity(lists: ListData, num_items: int) -> np.ndarray:
    """How often each item is a positive of the lists, [num_items] float64."""
    positives = lists.item_ids[lists.labels > 0].numpy()
    return np.bincount(positives, minlength=num_items).astype(np.float64)


def training_facts(config: Config, store: RunDir) -> dict[str, dict[str, object] | str]:
    """The parts of a model card that say what was trained on and by what: "data", "versions", "commit"."""
    data, report = config.data, store.require("lists").stats
    facts: dict[str, object] = {
        "dataset": data.dataset,
        "protocol": "logged lists" if config.logged.file else data.protocol,
        "positive rating": data.positive_rating,
        "candidates per list": data.num_candidates,
        "knowledge from": config.llm.path if config.llm.source == "vllm" else config.llm.source,
        "text encoder": config.encoder.path,
    }
    facts |= {name: report[name] for name in ("users", "items", "events", "lists") if name in report}
    return {"data": facts, "versions": versions(), "commit": commit()}
