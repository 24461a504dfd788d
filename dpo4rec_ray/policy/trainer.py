"""The training loop under DeepSpeed, for two objectives: DPO on preference pairs, and supervised texts.

One process per worker calls `train`; torch.distributed is already initialised (Ray Train does it). Every rank walks
the same seeded order and takes its share of each micro-batch, so that 1 and 2 workers see the same examples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dpo4rec_ray.core.losses import dpo_loss, nll_loss
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.batch import TokenBatch, collate, collate_pairs, completion_logits, completion_logps

Row = dict[str, Any]
Figures = dict[str, float]


@dataclass(frozen=True)
class TrainSettings:
    """Optimiser and schedule. `batch_size` counts rows per worker and micro-step."""

    lr: float
    epochs: int
    batch_size: int
    accumulation: int
    warmup_frac: float
    weight_decay: float
    max_grad_norm: float
    zero_stage: int
    dtype: str
    seed: int


class SupervisedObjective:
    """Mean negative log-likelihood of the completion tokens. Rows: prompt_token_ids, completion_token_ids."""

    dropout = True

    def __init__(self, pad_id: int):
        self._pad_id = pad_id

    def collate(self, rows: list[Row]) -> TokenBatch:
        prompts = [row["prompt_token_ids"] for row in rows]
        return collate(prompts, [row["completion_token_ids"] for row in rows], self._pad_id)

    def __call__(self, model: torch.nn.Module, batch: TokenBatch) -> tuple[torch.Tensor, Figures]:
        loss = nll_loss(*completion_logits(model, batch))
        return loss, {"loss": loss.item()}


class DPOObjective:
    """DPO with the LoRA switched off as reference (paper eq. 1). Rows: prompt, chosen and rejected token ids."""

    dropout = False  # policy and reference must see the same network, or the first loss is not ln 2

    def __init__(self, pad_id: int, beta: float):
        self._pad_id, self._beta = pad_id, beta

    def collate(self, rows: list[Row]) -> TokenBatch:
        columns = ([row[f"{name}_token_ids"] for row in rows] for name in ("prompt", "chosen", "rejected"))
        return collate_pairs(*columns, self._pad_id)

    def __call__(self, model: torch.nn.Module, batch: TokenBatch) -> tuple[torch.Tensor, Figures]:
        policy = completion_logps(model, batch)
        with torch.no_grad(), _peft(model).disable_adapter():
            reference = completion_logps(model, batch)
        half = len(policy) // 2
        losses, chosen, rejected = dpo_loss(
            policy[:half], policy[half:], reference[:half], reference[half:], self._beta
        )
        lengths = batch.completion_mask.sum(-1)
        ratio = (policy - reference).detach()
        figures = {
            "loss": losses.mean().item(),
            "chosen_reward": chosen.mean().item(),
            "rejected_reward": rejected.mean().item(),
            "margin": (chosen - rejected).mean().item(),
            "accuracy": (chosen > rejected).float().mean().item(),
            "chosen_logp": policy[:half].mean().item(),
            "rejected_logp": policy[half:].mean().item(),
            # Schulman's k3 estimate on the stored samples, which the reference (policy r-1) drew:
            # KL(ref || policy) per token, never negative
            "kl_per_token": ((ratio.exp() - 1 - ratio).sum() / lengths.sum()).item(),
            "chosen_length": lengths[:half].float().mean().item(),
            "rejected_length": lengths[half:].float().mean().item(),
        }
        return losses.mean(), figures


def _peft(model: torch.nn.Module) -> Any:
    return getattr(model, "module", model)  # the DeepSpeed engine keeps the peft model in .module


def train(
    model: torch.nn.Module,
    rows: list[Row],
    objective: SupervisedObjective | DPOObjective,
    settings: TrainSettings,
    *,
    on_step: Callable[[int, int, Figures], None],
    expect_first_loss: float | None = None,
) -> None:
    """Train `model` in place. `on_step(step, num_steps, figures)` is called on every rank after each optimiser step.

    Raises:
        UserError: the first loss is not `expect_first_loss` to 1e-3 (policy and reference differ at the start),
            or a loss is not finite.
    """
    import deepspeed

    rank, world = dist.get_rank(), dist.get_world_size()
    micro_per_epoch = math.ceil(len(rows) / (settings.batch_size * world))
    num_micro = micro_per_epoch * settings.epochs
    accumulation = min(settings.accumulation, num_micro)
    num_steps = math.ceil(
        num_micro / accumulation
    )  # the last step is filled up from one more pass over the rows
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(num_steps, settings.warmup_frac))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=_deepspeed_config(settings, accumulation),
        dist_init_required=False,
    )
    engine.train()
    engine.module.train(objective.dropout)
    step, sums, parts, tokens, started = 0, {}, 0, 0, time.monotonic()
    for index, share in enumerate(_shares(len(rows), settings, rank, world)):
        if index == num_steps * accumulation:
            break
        batch = objective.collate([rows[i] for i in share]).to(engine.device)
        loss, figures = objective(engine, batch)
        if index == 0 and expect_first_loss is not None:
            _check_first_loss(figures["loss"], expect_first_loss)
        if not math.isfinite(figures["loss"]):
            raise RuntimeError(
                f"step {step}: the loss is {figures['loss']}; lower the learning rate or use float32"
            )
        engine.backward(loss)
        engine.step()
        sums = {key: sums.get(key, 0.0) + value for key, value in figures.items()}
        parts += 1
        tokens += int(batch.attention_mask.sum())
        if parts < accumulation:
            continue
        step += 1
        mean = _mean_over_ranks({key: value / parts for key, value in sums.items()}, engine.device)
        norm = engine.get_global_grad_norm()
        mean["grad_norm"] = float(norm) if norm is not None else float("nan")
        mean["lr"] = schedule.get_last_lr()[0]
        mean["tokens_per_s"] = tokens * world / (time.monotonic() - started)
        on_step(step, num_steps, mean)
        sums, parts, tokens, started = {}, 0, 0, time.monotonic()


@torch.no_grad()
def evaluate_pairs(
    model: torch.nn.Module, rows: list[Row], objective: DPOObjective, batch_size: int
) -> Figures:
    """Mean DPO figures over held-out pairs, spread over the ranks; empty when there are no rows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = next(model.parameters()).device
    if not rows:
        return {}
    model.eval()
    share = [rows[i % len(rows)] for i in range(rank, max(len(rows), world), world)]
    totals: Figures = {}
    for start in range(0, len(share), batch_size):
        part = share[start : start + batch_size]
        _, figures = objective(model, objective.collate(part).to(device))
        totals = {key: totals.get(key, 0.0) + value * len(part) for key, value in figures.items()}
    weighted = {**totals, "_rows": float(len(share))}
    mean = _mean_over_ranks(weighted, device)
    return {key: mean[key] / mean["_rows"] for key in totals}


def _shares(num_rows: int, settings: TrainSettings, rank: int, world: int) -> Iterator[list[int]]:
    """This rank's rows of every micro-batch, epoch after epoch; the last micro-batch is filled up from the front."""
    size = settings.batch_size * world
    for epoch in range(settings.epochs + 1):
        order = np.random.default_rng([settings.seed, epoch]).permutation(num_rows)
        order = np.resize(order, math.ceil(num_rows / size) * size)
        for start in range(0, len(order), size):
            yield order[
                start + rank * settings.batch_size : start + (rank + 1) * settings.batch_size
            ].tolist()


def _check_first_loss(loss: float, expected: float) -> None:
    if abs(loss - expected) > 1e-3:
        raise UserError(
            f"the first DPO loss is {loss:.6f}, not ln 2 = {expected:.6f}: policy and reference differ before training; "
            "a wrong base folder, or a LoRA that does not start at zero, would do that"
        )


def _warmup_cosine(num_steps: int, warmup_frac: float) -> Callable[[int], float]:
    warmup = max(1, round(num_steps * warmup_frac))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, num_steps - warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    return factor


def _mean_over_ranks(figures: Figures, device: torch.device) -> Figures:
    values = torch.tensor(list(figures.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return dict(zip(figures, (values / dist.get_world_size()).tolist(), strict=True))


def _deepspeed_config(settings: TrainSettings, accumulation: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": {"stage": settings.zero_stage, "overlap_comm": False},
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeedCPUAdam would compile for minutes
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if settings.dtype != "float32":
        config["bf16" if settings.dtype == "bfloat16" else "fp16"] = {"enabled": True}
    return config
