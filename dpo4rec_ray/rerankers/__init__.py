"""Rerankers score the candidates of a list, seeing all of it. To add one: a file and a line in RERANKERS."""

from __future__ import annotations

from dataclasses import replace

import torch

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers.base import HistoryBatch, ListHistory, Reranker, RerankerSettings, with_history
from dpo4rec_ray.rerankers.catalogue import Catalogue, CatalogueShape, RerankBatch
from dpo4rec_ray.rerankers.dlcm import DLCM
from dpo4rec_ray.rerankers.mir import MIR
from dpo4rec_ray.rerankers.prm import PRM
from dpo4rec_ray.rerankers.setrank import SetRank

RERANKERS: dict[str, type[Reranker]] = {"dlcm": DLCM, "prm": PRM, "setrank": SetRank, "mir": MIR}


def build_reranker(
    name: str,
    catalogue_shape: CatalogueShape,
    knowledge: bool,
    settings: RerankerSettings = RerankerSettings(),  # noqa: B008 (frozen)
    *,
    seed: int = 0,
) -> Reranker:
    """A freshly initialised reranker. Same seed, same weights; torch's global generator is left alone.

    Args:
        name: key of RERANKERS; it replaces settings.backbone.
        catalogue_shape: `Catalogue.shape` of the items it will rank.
        knowledge: whether it reads user and item vectors.

    Raises:
        UserError: unknown backbone or adapter, or knowledge without item vectors.
    """
    if name not in RERANKERS:
        raise UserError(f"reranker.backbone = {name!r} is unknown; known: {', '.join(RERANKERS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RERANKERS[name](catalogue_shape, knowledge, replace(settings, backbone=name))
        model.init_weights()
    return model


__all__ = [
    "RERANKERS",
    "Catalogue",
    "CatalogueShape",
    "HistoryBatch",
    "ListHistory",
    "RerankBatch",
    "Reranker",
    "RerankerSettings",
    "build_reranker",
    "with_history",
]
