"""Artifacts as the arrays the rerankers want: catalogue, lists, and one vector per user."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.artifacts import RunDir
from dpo4rec_ray.config import Config
from dpo4rec_ray.rerankers import Catalogue, RerankerSettings
from dpo4rec_ray.rerankers.fit import ListData, load_reranker
from dpo4rec_ray.rerankers.samples import SampleScorer, UserLists
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.stages.common import seed_of


def reranker_settings(config: Config) -> RerankerSettings:
    section = config.reranker
    return RerankerSettings(backbone=section.backbone, adapter=section.adapter, similarity=section.similarity)


def read_vectors(
    store: RunDir, round_id: int, subject: str, sample_id: int | None = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Subject ids [S] and their vectors [S, D] of one round, in id order; sample_id None: all samples."""
    table = store.read("knowledge", round_id, columns=["subject", "subject_id", "sample_id", "vector"])
    chosen = pc.equal(table["subject"], subject)
    if sample_id is not None:
        chosen = pc.and_(chosen, pc.equal(table["sample_id"], sample_id))
    table = (
        table.filter(chosen)
        .sort_by([("subject_id", "ascending"), ("sample_id", "ascending")])
        .combine_chunks()
    )
    return table["subject_id"].to_numpy(), vectors_of(table["vector"])


def vectors_of(column: pa.ChunkedArray) -> np.ndarray:
    """A list column of equal lengths as [n, D] float32."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return flat.reshape(len(column), -1)


def read_catalogue(store: RunDir) -> Catalogue:
    """All items with their knowledge vectors."""
    attributes = store.read("items", columns=["attributes"])["attributes"].to_pylist()
    return Catalogue.from_items(attributes, read_vectors(store, 0, "item")[1])


def read_list_data(store: RunDir, split: str) -> ListData:
    """Lists of a split as tensors; a user's row in the vectors is the user id."""
    columns = ["list_id", "user_id", "candidate_item_ids", "labels"]
    table = store.read("lists", split=split, columns=columns)
    users = table["user_id"].to_numpy()
    return ListData.from_columns(
        table["candidate_item_ids"].to_pylist(), table["labels"].to_pylist(), users, users
    )


def sample_scorer(config: Config, store: RunDir) -> SampleScorer:
    """The reward rerankers with the lists of the training and validation users.

    A user is rewarded on the lists of the user's own split only: where lists are split by time, a training user's later
    lists must not choose what is trained on.
    """
    columns = ["user_id", "split", "candidate_item_ids", "labels"]
    table = store.read("lists", split=("train", "valid"), columns=columns)
    users = store.read("users", columns=["user_id", "split", "fold"])  # in user id order
    own_split = users["split"].take(table["user_id"])
    table = table.filter(pc.equal(table["split"], own_split))
    lists = UserLists.from_columns(
        table["user_id"].to_numpy(), table["candidate_item_ids"].to_pylist(), table["labels"].to_pylist()
    )
    catalogue = read_catalogue(store)
    folder = store.path("reward")
    scorers = [
        ListScorer([load_reranker(folder / f"fold-{fold}", catalogue)], catalogue)
        for fold in range(config.reward.num_folds)
    ]
    return SampleScorer(
        scorers,
        lists,
        users["fold"].to_numpy(),
        num_items=catalogue.shape.num_items,
        reward=config.reward.metric,
        num_redraws=config.reward.num_redraws,
        seed=seed_of(config.run.seed, "redraws"),
    )
