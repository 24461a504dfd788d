"""Rerankers and lists for the tests of this folder."""

from __future__ import annotations

import pyarrow as pa

from dpo4rec_ray.config.ranking import RerankerArchitecture
from dpo4rec_ray.rerankers import CatalogueShape, Reranker, build_reranker
from dpo4rec_ray.rerankers.fit import ListData
from dpo4rec_ray.store.reading import list_data


def build(
    backbone: str, shape: CatalogueShape, knowledge: bool, *, seed: int = 0, **architecture: object
) -> Reranker:
    """A new reranker with knowledge in its input layer, of the default architecture but for the values given."""
    values = {"backbone": backbone, "knowledge": "input", **architecture}
    return build_reranker(RerankerArchitecture(**values), shape, knowledge, seed=seed)


def make_lists(item_ids: list[list[int]], labels: list[list[float]], users: list[int]) -> ListData:
    """Lists without histories, through the reader that the stages use."""
    nothing = [[] for _ in users]
    columns = {
        "user_id": pa.array(users, pa.int64()),
        "candidate_item_ids": pa.array(item_ids, pa.list_(pa.int64())),
        "labels": pa.array(labels, pa.list_(pa.float32())),
        "history_item_ids": pa.array(nothing, pa.list_(pa.int64())),
        "history_ratings": pa.array(nothing, pa.list_(pa.float32())),
    }
    return list_data(pa.table(columns))
