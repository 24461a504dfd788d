"""Rerankers score the candidates of a list together. To add one: write a file and add a line to RERANKERS."""

from __future__ import annotations

import torch

from dpo4rec_ray.config.ranking import RerankerArchitecture
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers.base import Reranker
from dpo4rec_ray.rerankers.catalogue import CatalogueShape
from dpo4rec_ray.rerankers.dlcm import DLCM
from dpo4rec_ray.rerankers.mir import MIR
from dpo4rec_ray.rerankers.prm import PRM
from dpo4rec_ray.rerankers.setrank import SetRank

RERANKERS: dict[str, type[Reranker]] = {"dlcm": DLCM, "prm": PRM, "setrank": SetRank, "mir": MIR}


def build_reranker(
    architecture: RerankerArchitecture, shape: CatalogueShape, knowledge: bool, *, seed: int = 0
) -> Reranker:
    """A freshly initialised reranker. The same seed gives the same weights; torch's global generator stays as it is.

    Args:
        architecture: its keys in the recipe.
        shape: `Catalogue.shape` of the items that it will rank.
        knowledge: whether it reads user and item vectors.

    Raises:
        UserError: unknown backbone or adapter, or knowledge without item vectors.
    """
    name = architecture.backbone
    if name not in RERANKERS:
        raise UserError(f"reranker.backbone = {name!r} is unknown; known: {', '.join(RERANKERS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RERANKERS[name](shape, knowledge, architecture)
        model.init_weights()
        model.add_branch()  # last, so that the backbone's weights are those of the same seed without knowledge
    return model
