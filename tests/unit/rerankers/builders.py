"""Rerankers and lists for the tests of this folder."""

from __future__ import annotations

import pyarrow as pa
import torch

from dpo4rec_ray.config.ranking import RerankerArchitecture
from dpo4rec_ray.rerankers import CatalogueShape, Reranker, build_reranker
from dpo4rec_ray.rerankers.base import ListEmbedding
from dpo4rec_ray.rerankers.branches import BRANCHES, TextRegression
from dpo4rec_ray.rerankers.catalogue import RerankBatch
from dpo4rec_ray.rerankers.fit import ListData
from dpo4rec_ray.store.reading import list_data

WAYS = ("input", *BRANCHES)  # of reranker.knowledge


def build(
    backbone: str,
    shape: CatalogueShape,
    knowledge: bool,
    *,
    way: str = "input",
    seed: int = 0,
    **architecture: object,
) -> Reranker:
    """A new reranker of the default architecture but for the values given; `way` is reranker.knowledge."""
    values = {"backbone": backbone, "knowledge": way, **architecture}
    return build_reranker(RerankerArchitecture(**values), shape, knowledge, seed=seed)


def with_full_branch(model: Reranker, seed: int = 0) -> Reranker:
    """The same model; its branch, if it has one, has weights as if it were fitted. A branch of zeros would hide mistakes."""
    draw = torch.Generator().manual_seed(seed)
    if isinstance(model.branch, TextRegression):
        for table in (model.branch.text_map, model.branch.item_factors):
            table.copy_(torch.randn(table.shape, generator=draw) / table.shape[1] ** 0.25)
        model.branch.mean.fill_(0.01)
        model.branch.gates.copy_(torch.tensor([0.7, 0.4]))
    elif model.branch is not None:
        with torch.no_grad():
            for name, weight in model.branch.named_parameters():
                if name == "user_projection.weight":
                    weight.copy_(torch.randn(weight.shape, generator=draw) / 10)
                elif name == "similarity_weight":
                    weight.fill_(0.4)
    return model


def inputs_of(layer: ListEmbedding, batch: RerankBatch) -> torch.Tensor:
    """What the input layer of a reranker with knowledge makes of a batch's candidates: [B, L, width]."""
    assert batch.user_vectors is not None
    items = layer.item_side(batch.item_ids, batch.attribute_ids, batch.item_vectors)
    users = layer.user_side(batch.user_vectors)
    return layer.combine(items, batch.index, users, batch.user_rows, batch.similarity)


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
