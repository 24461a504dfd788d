"""Trains a reranker on candidate lists, chooses its epoch on validation lists, saves and loads it.

Differences from KAR's script: the epoch is chosen on users who are not tested; patience is generous or off, because PRM
stays at popularity level for some epochs before it learns; the negatives may be drawn anew in every epoch. Runs in one
process, or in DistributedDataParallel with one share of the training lists per rank.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dpo4rec_ray.config.ranking import FitSection, RerankerArchitecture
from dpo4rec_ray.config.section import first_mistake
from dpo4rec_ray.core.candidates import redraw_negatives
from dpo4rec_ray.core.losses import RANKING_LOSSES
from dpo4rec_ray.core.metrics import list_metrics, parse_metric
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers import build_reranker
from dpo4rec_ray.rerankers.base import Reranker
from dpo4rec_ray.rerankers.card import CARD_FILE, card_text, read_card
from dpo4rec_ray.rerankers.catalogue import Catalogue, CatalogueShape, Histories, TensorRows, tensor_of
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.storage.local_copies import local_copy
from dpo4rec_ray.storage.places import new_file, place, write_text

WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class ListData(TensorRows):
    """n candidate lists as dense tensors, padded to the longest."""

    item_ids: Tensor  # [n, L] int64, 0 at padding
    labels: Tensor  # [n, L] float32, 0 at padding
    mask: Tensor  # [n, L] bool, True is a real candidate
    user_rows: Tensor  # [n] int64, row of the list's user in user_vectors
    user_ids: Tensor  # [n] int64
    histories: Histories | None = None  # for backbones that read them; None: every history is empty

    def __len__(self) -> int:
        return len(self.item_ids)


@dataclass(frozen=True)
class FitResult:
    """One record per epoch, and the epoch whose weights were kept."""

    history: list[dict[str, Any]]
    best_epoch: int
    best_value: float


def fit(
    model: Reranker | DistributedDataParallel,
    catalogue: Catalogue,
    train: ListData,
    valid: ListData,
    user_vectors: np.ndarray | Tensor | None,
    section: FitSection,
    *,
    seed: int = 0,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> FitResult:
    """Train with AdamW at a constant rate, and keep the weights of the best validation epoch in `model`.

    Args:
        model: on the device to train on; in DistributedDataParallel when several ranks train together.
        catalogue: the items.
        train: this rank's lists; ranks may hold different numbers and take the same number of steps.
        valid: the whole validation set, on every rank.
        user_vectors: [U, D], row numbers are ListData.user_rows; None without knowledge. [U, K, D] has K texts per user:
            each epoch draws one for each training list, and validation lists are ranked with the first.
        section: how to train; give rerankers with and without knowledge the same.
        seed: of the order of the lists and of the new negatives.
        on_epoch: called on every rank after each epoch with its record: epoch, train_loss, valid (the metric),
            seconds (of training alone), lists_per_second (of this rank).

    Raises:
        UserError: no lists, ids outside the catalogue, unknown metric, or a loss that is not finite.
    """
    if not len(train) or not len(valid):
        raise UserError(
            f"fit needs lists: {len(train)} for training, {len(valid)} for validation; check the split"
        )
    parse_metric(section.metric)
    bare = unwrapped(model)
    distributed = bare is not model
    device = next(bare.parameters()).device
    for lists in (train, valid):
        catalogue.check_ids(lists.item_ids)
        if lists.histories is not None:
            catalogue.check_ids(lists.histories.item_ids)
    if not bare.uses_history:
        train = replace(train, histories=None)
    catalogue, train = catalogue.to(device), train.to(device)
    vectors, valid_vectors, valid_rows, num_texts = None, None, None, 1
    if bare.knowledge:
        if user_vectors is None:
            raise UserError(
                "a reranker with knowledge needs user_vectors to train on; run the stage encode first"
            )
        vectors = tensor_of(user_vectors).to(device, torch.float32)
        num_texts = 1 if vectors.ndim == 2 else vectors.shape[1]
        vectors = vectors.view(-1, vectors.shape[-1])
        used, valid_rows = torch.unique(valid.user_rows, return_inverse=True)
        valid_vectors = vectors[used.to(device) * num_texts]
        # One row more: the zeros of a list that is trained without its text.
        vectors = torch.cat([vectors, torch.zeros_like(vectors[:1])])
    dropout = 0.0 if bare.branch is None else bare.architecture.knowledge_dropout
    valid_labels, valid_mask = valid.labels.cpu().numpy(), valid.mask.cpu().numpy()

    loss_of = RANKING_LOSSES[bare.loss]
    temperature = section.temperature if bare.loss == "listwise_softmax" else 1.0
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, section.lr, weight_decay=section.weight_decay, fused=True)
    shuffle = torch.Generator().manual_seed(seed)
    redraw = np.random.default_rng(seed)
    num_steps = math.ceil(len(train) / section.batch_size)
    if distributed:
        # Every rank takes part in every gradient reduction, so all take as many steps as the rank with most lists.
        num_steps = int(_reduce(num_steps, dist.ReduceOp.MAX, device))
        if _reduce(len(train), dist.ReduceOp.MIN, device) < num_steps:
            raise UserError(
                f"a rank has fewer training lists than there are steps ({num_steps}); lower reward.num_workers"
            )

    history: list[dict[str, Any]] = []
    best_epoch, best_value, best_weights = 0, -math.inf, None
    for epoch in range(1, section.epochs + 1):
        began = time.perf_counter()
        lists = _with_new_negatives(train, catalogue, redraw) if section.resample_negatives else train
        if num_texts > 1:
            drawn = torch.randint(num_texts, (len(lists),), generator=shuffle).to(device)
            lists = replace(lists, user_rows=lists.user_rows * num_texts + drawn)
        if vectors is not None and dropout:
            dropped = (torch.rand(len(lists), generator=shuffle) < dropout).to(device)
            lists = replace(lists, user_rows=lists.user_rows.masked_fill(dropped, len(vectors) - 1))
        is_full = bool(lists.mask.all())  # attention without a mask is faster
        # A backbone behind which a branch is trained stays as it was fitted, its norms too.
        model.train()
        if bare.branch is not None:
            model.eval()
            bare.branch.train()
        loss_sum = torch.zeros((), device=device)
        for index in torch.randperm(len(lists), generator=shuffle).to(device).tensor_split(num_steps):
            some = lists.select(index)
            mask = None if is_full else some.mask
            batch = catalogue.batch(some.item_ids, mask, vectors, some.user_rows, some.histories)
            loss = loss_of(model(batch) / temperature, some.labels, some.mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach() * len(some)
        train_loss = float(loss_sum) / len(lists)
        if distributed:
            train_loss = _reduce(train_loss, dist.ReduceOp.SUM, device) / dist.get_world_size()
        if not math.isfinite(train_loss):
            raise UserError(
                f"training loss is {train_loss} in epoch {epoch}: lower reranker.lr ({section.lr})"
            )
        seconds = time.perf_counter() - began
        scores = ListScorer([bare], catalogue).score(
            valid.item_ids, valid.mask, valid_vectors, valid_rows, valid.histories
        )
        measured = list_metrics(scores, valid_labels, [section.metric], valid_mask)
        value = float(np.mean(measured[section.metric]))
        if distributed:
            # One value for all ranks, so that all of them stop after the same epoch.
            value = _reduce(value, dist.ReduceOp.MIN, device)
        record = {
            "epoch": epoch,
            "train_loss": train_loss,
            "valid": value,
            "seconds": seconds,
            "lists_per_second": len(lists) / seconds,
        }
        history.append(record)
        if value > best_value:
            best_epoch, best_value = epoch, value
            best_weights = {name: tensor.detach().clone() for name, tensor in bare.state_dict().items()}
        if on_epoch is not None:
            on_epoch(record)
        if section.patience and epoch - best_epoch >= section.patience:
            break
    bare.load_state_dict(best_weights)
    bare.eval()
    return FitResult(history, best_epoch, best_value)


def unwrapped(model: Reranker | DistributedDataParallel) -> Reranker:
    """The reranker itself, where several ranks train it together."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def save_reranker(
    folder: str | Path, model: Reranker | DistributedDataParallel, info: dict[str, Any]
) -> None:
    """Write model.safetensors, reranker.json (architecture, catalogue shape and `info`, a JSON object) and a model card."""
    bare = unwrapped(model)
    target = place(folder)
    target.mkdir(parents=True, exist_ok=True)
    with new_file(target / WEIGHTS_FILE) as temporary:
        save_file({name: tensor.contiguous().cpu() for name, tensor in bare.state_dict().items()}, temporary)
    card = {
        "knowledge": bare.knowledge,
        "settings": bare.architecture.model_dump(),
        "catalogue": asdict(bare.shape),
        "info": info,
    }
    write_text(target / CARD_FILE, json.dumps(card, indent=1))
    write_text(target / "README.md", card_text(card))


def load_reranker(folder: str | Path, catalogue: Catalogue) -> Reranker:
    """The reranker of `save_reranker`, on the CPU, in eval mode.

    Raises:
        UserError: a file is missing or damaged, or the reranker was trained on a catalogue of another shape.
    """
    folder = place(folder)
    card = read_card(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(f"{folder}: no {WEIGHTS_FILE} beside {CARD_FILE}; train this reranker again")
    try:
        # Rerankers that were saved before there was a choice read their knowledge in the input layer.
        architecture = RerankerArchitecture.model_validate({"knowledge": "input"} | card["settings"])
    except ValidationError as error:
        raise UserError(
            f"{folder / CARD_FILE}: settings.{first_mistake(error)}; load it with the release that saved it, or train it again"
        ) from None
    trained_on = card["catalogue"]
    shape = CatalogueShape(**{**trained_on, "facet_sizes": tuple(trained_on["facet_sizes"])})
    # A reranker without knowledge does not read the items' vectors: their width does not matter.
    here = catalogue.shape if card["knowledge"] else replace(catalogue.shape, vector_dim=shape.vector_dim)
    if shape != here:
        raise UserError(
            f"{folder}: trained on {shape}, but this catalogue is {here}; train the reranker again"
        )
    model = build_reranker(architecture, shape, card["knowledge"])
    model.load_state_dict(load_file(local_copy(folder / WEIGHTS_FILE)))
    return model.eval()


def _with_new_negatives(lists: ListData, catalogue: Catalogue, rng: np.random.Generator) -> ListData:
    """The lists with a new item at every place that is not a positive: low-rated items are replaced too."""
    item_ids, labels = redraw_negatives(
        lists.item_ids.cpu().numpy(), lists.labels.cpu().numpy(), catalogue.shape.num_items, 1, rng
    )
    device = lists.item_ids.device
    return replace(
        lists, item_ids=torch.as_tensor(item_ids[0]).to(device), labels=torch.as_tensor(labels[0]).to(device)
    )


def _reduce(value: float, operation: dist.ReduceOp, device: torch.device) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, operation)
    return float(tensor)
