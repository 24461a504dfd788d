"""Trains a reranker on candidate lists, chooses its epoch on validation lists, saves and loads it.

Departures from KAR's script: the epoch is chosen on held-out training users, never on test; patience is
generous or off, because PRM sits at popularity level for epochs before it climbs; the negatives may be
redrawn every epoch. Runs alone or in DistributedDataParallel, one shard of the training lists per rank.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dpo4rec_ray.core.candidates import redraw_negatives
from dpo4rec_ray.core.losses import RANKING_LOSSES
from dpo4rec_ray.core.metrics import metric_by_name
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers import build_reranker
from dpo4rec_ray.rerankers.base import Reranker, RerankerSettings, with_history
from dpo4rec_ray.rerankers.card import card_text
from dpo4rec_ray.rerankers.catalogue import Catalogue, CatalogueShape, Histories
from dpo4rec_ray.rerankers.scorer import ListScorer

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "reranker.json"


@dataclass(frozen=True)
class ListData:
    """n candidate lists as dense tensors, padded to the longest."""

    item_ids: Tensor  # [n, L] int64, 0 at padding
    labels: Tensor  # [n, L] float32, 0 at padding
    mask: Tensor  # [n, L] bool, True is a real candidate
    user_rows: Tensor  # [n] int64, row of the list's user in user_vectors
    user_ids: Tensor  # [n] int64
    histories: Histories | None = None  # for backbones that read them; None: every history is empty

    def __len__(self) -> int:
        return len(self.item_ids)

    def select(self, index: Tensor | slice) -> ListData:
        """The lists at `index` (positions, a boolean mask, or a slice such as [rank::world_size])."""
        histories = None if self.histories is None else self.histories.select(index)
        return ListData(*(column[index] for column in self._columns()), histories)

    def to(self, device: torch.device | str) -> ListData:
        """The same lists on `device`."""
        histories = None if self.histories is None else self.histories.to(device)
        return ListData(*(column.to(device) for column in self._columns()), histories)

    def _columns(self) -> tuple[Tensor, ...]:
        return self.item_ids, self.labels, self.mask, self.user_rows, self.user_ids


@dataclass(frozen=True)
class FitSettings:
    """Training budget; give the same one to rerankers with and without knowledge."""

    epochs: int = 20
    batch_size: int = 256  # lists per step and rank
    lr: float = 1e-3
    weight_decay: float = 0.0
    temperature: float = 1.0  # scores are divided by it in a softmax loss; no part of a pointwise one
    patience: int = 0  # stop after this many epochs without a better validation figure; 0: run all epochs
    metric: str = "ndcg@5"
    seed: int = 0
    resample_negatives: bool = False  # redraw every non-positive candidate of the training lists each epoch


@dataclass(frozen=True)
class FitResult:
    """What happened: one record per epoch, and the epoch whose weights were kept."""

    history: list[dict]
    best_epoch: int
    best_value: float


def fit(
    model: Reranker | DistributedDataParallel,
    catalogue: Catalogue,
    train: ListData,
    valid: ListData,
    user_vectors: np.ndarray | Tensor | None,
    settings: FitSettings,
    *,
    on_epoch: Callable[[dict], None] | None = None,
) -> FitResult:
    """Train with AdamW at a constant rate, keep the weights of the best validation epoch in `model`.

    Args:
        model: on the device to train on; in DistributedDataParallel when several ranks train together.
        catalogue: the items.
        train: this rank's lists; ranks may hold different numbers and take the same number of steps.
        valid: the whole validation set, on every rank.
        user_vectors: [U, D], row numbers are ListData.user_rows; None without knowledge.
        settings: the budget.
        on_epoch: called on every rank after each epoch with its record: epoch, train_loss, valid (the
            metric), seconds (training only), lists_per_second (of this rank).

    Raises:
        UserError: no lists, ids outside the catalogue, unknown metric, or a loss that is no longer finite.
    """
    if not len(train) or not len(valid):
        raise UserError(
            f"fit needs lists: {len(train)} for training, {len(valid)} for validation; check the split"
        )
    metric = metric_by_name(settings.metric)
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    distributed = bare is not model
    device = next(bare.parameters()).device
    catalogue, train = catalogue.to(device), train.to(device)
    for lists in (train, valid):
        catalogue.check_ids(lists.item_ids)
        if lists.histories is not None:
            catalogue.check_ids(lists.histories.item_ids)
    vectors, valid_vectors, valid_rows = None, None, None
    if bare.knowledge:
        if user_vectors is None:
            raise UserError(
                "a reranker with knowledge needs user_vectors to train on; run the encode stage first"
            )
        vectors = torch.as_tensor(user_vectors).to(device, torch.float32)
        used, valid_rows = torch.unique(valid.user_rows, return_inverse=True)
        valid_vectors = vectors[used.to(device)]
    valid_labels, valid_mask = valid.labels.cpu().numpy(), valid.mask.cpu().numpy()

    loss_of = RANKING_LOSSES[bare.loss]
    temperature = settings.temperature if bare.loss == "listwise_softmax" else 1.0
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True
    )
    shuffle = torch.Generator().manual_seed(settings.seed)
    redraw = np.random.default_rng(settings.seed)
    num_steps = math.ceil(len(train) / settings.batch_size)
    if distributed:
        # Every rank must take part in every gradient reduction: all take the largest rank's number of steps.
        num_steps = int(_reduce(num_steps, dist.ReduceOp.MAX, device))
        if _reduce(len(train), dist.ReduceOp.MIN, device) < num_steps:
            raise UserError(
                f"a rank has fewer training lists than there are steps ({num_steps}); use fewer workers"
            )

    history: list[dict] = []
    best_epoch, best_value, best_weights = 0, -math.inf, None
    for epoch in range(1, settings.epochs + 1):
        began = time.perf_counter()
        lists = _with_new_negatives(train, catalogue, redraw) if settings.resample_negatives else train
        full = bool(lists.mask.all())  # attention without a mask is faster
        model.train()
        loss_sum = torch.zeros((), device=device)
        for index in torch.randperm(len(lists), generator=shuffle).to(device).tensor_split(num_steps):
            batch = catalogue.batch(
                lists.item_ids[index], None if full else lists.mask[index], vectors, lists.user_rows[index]
            )
            if bare.uses_history and lists.histories is not None:
                seen = lists.histories.select(index)
                batch = with_history(batch, catalogue, seen.item_ids, seen.mask, seen.ratings)
            loss = loss_of(model(batch) / temperature, lists.labels[index], lists.mask[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach() * len(index)
        train_loss = float(loss_sum) / len(lists)
        if distributed:
            train_loss = _reduce(train_loss, dist.ReduceOp.SUM, device) / dist.get_world_size()
        if not math.isfinite(train_loss):
            raise UserError(
                f"training loss is {train_loss} in epoch {epoch}: lower reranker.lr ({settings.lr})"
            )
        seconds = time.perf_counter() - began
        scores = ListScorer([bare], catalogue).score(
            valid.item_ids, valid.mask, valid_vectors, valid_rows, valid.histories
        )
        value = float(np.mean(metric(scores, valid_labels, valid_mask)))
        if distributed:
            # One figure for all ranks, so that none stops alone while the others wait.
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
        if settings.patience and epoch - best_epoch >= settings.patience:
            break
    bare.load_state_dict(best_weights)
    bare.eval()
    return FitResult(history, best_epoch, best_value)


def save_reranker(folder: str | Path, model: Reranker | DistributedDataParallel, info: dict) -> None:
    """Write model.safetensors, reranker.json (architecture, catalogue shape and `info`, a JSON object) and a model card."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in bare.state_dict().items()}, folder / WEIGHTS_FILE
    )
    card = {
        "knowledge": bare.knowledge,
        "settings": asdict(bare.settings),
        "catalogue": asdict(bare.shape),
        "info": info,
    }
    (folder / CARD_FILE).write_text(json.dumps(card, indent=1), encoding="utf-8")
    (folder / "README.md").write_text(card_text(card), encoding="utf-8")


def load_reranker(folder: str | Path, catalogue: Catalogue) -> Reranker:
    """The reranker of `save_reranker`, on the CPU, in eval mode.

    Raises:
        UserError: files missing, or trained on a catalogue of another shape.
    """
    folder = Path(folder)
    if not (folder / CARD_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise UserError(
            f"{folder}: no {CARD_FILE} with {WEIGHTS_FILE} here; run the stage that trains this reranker"
        )
    card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    settings, trained_on = RerankerSettings(**card["settings"]), card["catalogue"]
    shape = CatalogueShape(**{**trained_on, "facet_sizes": tuple(trained_on["facet_sizes"])})
    # Without knowledge the items' vectors play no part.
    here = catalogue.shape if card["knowledge"] else replace(catalogue.shape, vector_dim=shape.vector_dim)
    if shape != here:
        raise UserError(
            f"{folder}: trained on {shape}, but this catalogue is {here}; train the reranker again"
        )
    model = build_reranker(settings.backbone, shape, card["knowledge"], settings)
    model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return model.eval()


def _with_new_negatives(lists: ListData, catalogue: Catalogue, rng: np.random.Generator) -> ListData:
    """The lists with every place redrawn but the positives; low-rated events are redrawn too."""
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
