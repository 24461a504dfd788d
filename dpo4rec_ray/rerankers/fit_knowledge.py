"""Fits a reranker with knowledge so that texts cannot do harm: backbone first, then a branch that validation has to want.

Beyond the paper, whose way is `reranker.knowledge = "input"`: there the whole network is trained at once, by `fit`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo4rec_ray.config.ranking import FitSection, RerankerArchitecture
from dpo4rec_ray.core.evidence import evidence_of_texts
from dpo4rec_ray.core.intervals import clustered_std_error
from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.rerankers import build_reranker
from dpo4rec_ray.rerankers.base import Reranker
from dpo4rec_ray.rerankers.branches import TextRegression
from dpo4rec_ray.rerankers.catalogue import Catalogue, dot_places, tensor_of
from dpo4rec_ray.rerankers.fit import FitResult, ListData, fit, unwrapped
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.rerankers.text_regression import text_regression

# How strongly the two terms of a regression branch may count, in standard deviations of the backbone's scores within a list.
AFFINITY_GATES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2)
SIMILARITY_GATES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
# The likelihood of the validation lists has to grow by so many standard errors before texts are believed: one-sided 95 %.
BELIEVED_AT = 1.645


@dataclass(frozen=True)
class Gain:
    """What the texts bring on the validation lists: mean of the metric without and with them, and the standard error of
    their difference.

    `kept` is false where that is no gain, or where the `evidence` (core/evidence.py) is not above BELIEVED_AT: then the branch
    was erased, and the reranker ranks as its backbone.
    """

    without: float
    with_texts: float
    std_error: float
    evidence: float
    kept: bool


@dataclass(frozen=True)
class KnowledgeFit:
    """A fitted reranker with how it was fitted; `gain` is None without knowledge, and where it enters the input layer."""

    model: Reranker
    result: FitResult
    gain: Gain | None


def fit_reranker(
    architecture: RerankerArchitecture,
    catalogue: Catalogue,
    train: ListData,
    valid: ListData,
    user_vectors: np.ndarray | Tensor | None,
    section: FitSection,
    *,
    seed: int = 0,
    backbone: Reranker | None = None,
    place: Callable[[Reranker], Any] = lambda model: model,
    share: slice = slice(None),
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> KnowledgeFit:
    """Fit a reranker, with knowledge if there are `user_vectors`.

    Args:
        architecture, section: its keys in the recipe.
        catalogue, valid, on_epoch: as in `fit`.
        train: the training lists of all ranks.
        user_vectors: [U, D], or [U, K, D] with K texts per user, of which the first is ranked with; row u is user id u.
        seed: of weights and order.
        backbone: the same reranker without knowledge, if it is fitted already. Not changed.
        place: puts a new model on its device, or into DistributedDataParallel.
        share: this rank's training lists.

    Raises:
        UserError: as `fit` and `build_reranker`.
    """
    joint = user_vectors is None or architecture.knowledge == "input"
    if joint:
        model = place(build_reranker(architecture, catalogue.shape, user_vectors is not None, seed=seed))
        result = fit(
            model, catalogue, train.select(share), valid, user_vectors, section, seed=seed, on_epoch=on_epoch
        )
        return KnowledgeFit(unwrapped(model), result, None)
    if backbone is None:
        fitted = fit_reranker(
            architecture,
            catalogue,
            train,
            valid,
            None,
            section,
            seed=seed,
            place=place,
            share=share,
            on_epoch=on_epoch,
        )
        backbone, result = fitted.model, fitted.result
    else:
        result = FitResult([], 0, 0.0)
    model = build_reranker(architecture, catalogue.shape, True, seed=seed)
    model.load_state_dict(backbone.state_dict(), strict=False)
    branch = model.branch
    assert branch is not None
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith("branch."))
    vectors = tensor_of(user_vectors).float()
    if vectors.ndim == 2:
        vectors = vectors.unsqueeze(1)
    without = _scores(backbone, catalogue, valid, None)
    if isinstance(branch, TextRegression):
        model = model.to(next(backbone.parameters()).device)
        _fit_regression(branch, catalogue, train, valid, vectors, architecture, section, without)
    else:
        placed = place(model)
        found = fit(
            placed, catalogue, train.select(share), valid, vectors, section, seed=seed, on_epoch=on_epoch
        )
        model = unwrapped(placed)
        result = replace(found, history=[*result.history, *found.history])
    gain = _gain(model, catalogue, valid, vectors[:, 0], without, section.metric)
    if not gain.kept:
        branch.erase()
    value = gain.with_texts if gain.kept else gain.without
    return KnowledgeFit(model.eval(), replace(result, best_value=value), gain)


def _fit_regression(
    branch: TextRegression,
    catalogue: Catalogue,
    train: ListData,
    valid: ListData,
    vectors: Tensor,
    architecture: RerankerArchitecture,
    section: FitSection,
    without: np.ndarray,
) -> None:
    """Fill the branch: the map from training users' likes, the gates by the metric on the validation lists."""
    lists, places = torch.nonzero(train.labels > 0, as_tuple=True)
    found = text_regression(
        vectors,
        train.user_ids[lists],
        train.item_ids[lists, places],
        catalogue.shape.num_items,
        branch.text_map.shape[1],
        architecture.regression_ridge,
    )
    if found is not None:
        for name, values in found._asdict().items():
            getattr(branch, name).copy_(values)
    used, rows = torch.unique(valid.user_rows, return_inverse=True)
    device = branch.mean.device
    users, ids = vectors[used, 0].to(device), valid.item_ids.to(device)
    here = catalogue.to(device)
    assert here.directions is not None
    standard = here.standardise_users(users)
    terms = [
        dot_places(branch.user_side(users), rows.to(device), branch.item_factors, ids).cpu().numpy(),
        dot_places(standard, rows.to(device), here.directions, ids).cpu().numpy(),
    ]
    mask, labels = valid.mask.cpu().numpy(), valid.labels.cpu().numpy()
    unit = _spread_within_lists(without, mask)
    best = (float(_metric(without, labels, mask, section.metric).mean()), 0.0, 0.0)
    for affinity in AFFINITY_GATES if found is not None else (0.0,):
        for similarity in SIMILARITY_GATES if architecture.similarity else (0.0,):
            scores = without + unit * (affinity * terms[0] + similarity * terms[1])
            value = float(_metric(scores, labels, mask, section.metric).mean())
            best = max(best, (value, affinity * unit, similarity * unit), key=lambda one: one[0])
    branch.gates.copy_(torch.tensor(best[1:]))


def _gain(
    model: Reranker, catalogue: Catalogue, valid: ListData, vectors: Tensor, without: np.ndarray, metric: str
) -> Gain:
    mask, labels = valid.mask.cpu().numpy(), valid.labels.cpu().numpy()
    scores = _scores(model, catalogue, valid, vectors)
    users = valid.user_ids.cpu().numpy()
    before, after = (_metric(one, labels, mask, metric) for one in (without, scores))
    error = clustered_std_error(after - before, users)
    evidence = evidence_of_texts(without, scores, labels, mask, users)
    kept = bool(after.mean() > before.mean()) and evidence > BELIEVED_AT
    return Gain(float(before.mean()), float(after.mean()), error, evidence, kept)


def _scores(model: Reranker, catalogue: Catalogue, lists: ListData, vectors: Tensor | None) -> np.ndarray:
    used, rows = torch.unique(lists.user_rows, return_inverse=True)
    own = None if vectors is None else vectors[used]
    return ListScorer([model], catalogue).score(lists.item_ids, lists.mask, own, rows, lists.histories)


def _metric(scores: np.ndarray, labels: np.ndarray, mask: np.ndarray, metric: str) -> np.ndarray:
    return list_metrics(scores, labels, [metric], mask)[metric]


def _spread_within_lists(scores: np.ndarray, mask: np.ndarray) -> float:
    """Mean over lists of the standard deviation of the real candidates' scores."""
    values = np.where(mask, scores, np.nan)
    return float(np.nanmean(np.nanstd(values, axis=1)))
