"""The training loop under DeepSpeed ZeRO, for any objective of policy.objectives.

One process per worker; torch.distributed is already initialised (Ray Train does it). The rows of a step do not depend on
how many workers share them (policy.order), and a state that was saved after step k continues with step k + 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpo4rec_ray.config.training import TrainerSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.deepspeed_config import deepspeed_config
from dpo4rec_ray.policy.logps import CompletionLogps
from dpo4rec_ray.policy.objectives import Metrics, Objective, TrainingRow
from dpo4rec_ray.policy.order import StepOrder

LOWER_LR = 'lower lr, or set llm.dtype = "float32"'


@dataclass(frozen=True)
class FirstFigure:
    """What a metric is in the first step, where the policy is its reference."""

    name: str
    value: float
    tolerance: float

    def check(self, metrics: Metrics) -> None:
        """Raises UserError where it is not."""
        if not abs(metrics[self.name] - self.value) <= self.tolerance:
            raise UserError(
                f"step 1: {self.name} is {metrics[self.name]:.6f}, not {self.value:.6f}: before training the policy is not "
                "the one that it is compared with; a wrong base folder, stale log-probabilities or a LoRA that does not start at "
                "zero would do that"
            )


class Trainer:
    """One worker's part in a training.

    >>> trainer = Trainer(model, rows, objective, config.policy, dtype="bfloat16", seed=0)
    >>> trainer.load(folder)            # to continue
    >>> trainer.run(on_step)
    """

    def __init__(
        self,
        model: CompletionLogps,
        rows: Sequence[TrainingRow],
        objective: Objective,
        section: TrainerSection,
        *,
        dtype: str,
        seed: int,
        lengths: Sequence[int] | None = None,
        extra: dict[str, Any] | None = None,
    ):
        """
        Args:
            model: its weights that require gradients are trained in place.
            rows: all rows of all workers.
            section: optimiser, schedule, batch sizes and sharding.
            dtype: of the weights: "float32", "bfloat16" or "float16".
            seed: of the order of the rows and of LoRA's dropout.
            lengths: tokens per row, so that rows of similar length meet in a step; None keeps the drawn order.
            extra: merged over DeepSpeed's config.

        Raises:
            UserError: there are no rows.
        """
        import deepspeed

        if not len(rows):
            raise UserError("nothing to train on: 0 rows")
        self._rows, self._objective, self._section = rows, objective, section
        self._dtype, self._seed = dtype, seed
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self.order = StepOrder(len(rows), section.global_batch_size, section.epochs, seed, lengths)
        self._gradient_accumulation_steps = self.order.micro_batches(section.batch_size, self._world)
        self.step = 0  # steps that are done
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=section.lr, weight_decay=section.weight_decay)
        factor = schedule_factor(section.schedule, self.order.num_steps, section.warmup_frac)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        without_dropout(model)
        _exchange_through_torch()
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=self._schedule,
            config=deepspeed_config(section, dtype, self._gradient_accumulation_steps, extra or {}),
            dist_init_required=False,
        )
        if not section.zero_stage and dtype != "float32":
            # DeepSpeed creates Adam's states by a step without gradients, which Adam counts as its first
            for state in self.engine.optimizer.optimizer.state.values():
                state["step"].zero_()

    def save(self, folder: Path) -> None:
        """This worker's part of a state to continue from. Every worker calls it with its own folder."""
        self.engine.save_checkpoint(
            str(folder), tag="state", client_state={"step": self.step}, exclude_frozen_parameters=True
        )

    def load(self, folder: Path) -> None:
        """Continue after the step that was saved. DeepSpeed's files are pickles: load only what this project has written."""
        _, state = self.engine.load_checkpoint(str(folder), tag="state", load_module_strict=False)
        self.step = state["step"]

    def run(
        self,
        on_step: Callable[[int, int, Metrics], bool],
        *,
        expect_first: FirstFigure | None = None,
    ) -> None:
        """Train to the end, or until `on_step(step, num_steps, metrics)` returns True; all workers must return the same.

        `step` counts from 1; metrics are means over the rows of the step, of all workers.

        expect_first: what a metric of the first step must be.

        Raises:
            UserError: a figure of the first step is not the expected one (policy and reference differ at the start), or a loss
                or gradient is not finite.
        """
        engine, batch_size = self.engine, self._section.batch_size
        engine.train()
        started = time.monotonic()
        for step in self.order.steps(batch_size, self._rank, self._world, self.step):
            sums: Metrics = {}
            lr = self._schedule.get_last_lr()[0]  # of this step: afterwards it is the next one's
            norm: torch.Tensor | None = None
            for micro, share in enumerate(step.shares):
                # a worker without rows takes one with weight 0: all workers must take part in each exchange
                rows = [self._rows[i] for i in share or step.rows[:1]]
                batch = self._objective.collate(rows).to(engine.device)
                # LoRA's dropout is the same whether the run was interrupted or not
                torch.manual_seed(self._seed + 1_000_003 * step.index + 1009 * micro + self._rank)
                loss, found = self._objective(engine, batch)
                weight = self._gradient_accumulation_steps * self._world / len(step.rows) if share else 0.0
                engine.backward(loss * weight)
                if engine.is_gradient_accumulation_boundary():
                    norm = self._plain_norm()
                engine.step()
                if share:
                    found["tokens"] = float(batch.tokens.num_tokens)
                    sums = {key: sums.get(key, 0.0) + value for key, value in found.items()}
            mean = {key: value / len(step.rows) for key, value in self._total(sums).items()}
            step_tokens = mean.pop("tokens") * len(step.rows)
            if not math.isfinite(mean["loss"]):
                raise UserError(f"step {step.index + 1}: the loss is {mean['loss']}; {LOWER_LR}")
            if step.index == 0 and expect_first is not None:
                expect_first.check(mean)
            mean["grad_norm"] = float(engine.get_global_grad_norm() if norm is None else norm)
            # with float16 DeepSpeed skips a step whose gradients overflow, and lowers its loss scale
            if not math.isfinite(mean["grad_norm"]) and self._dtype != "float16":
                raise UserError(
                    f"step {step.index + 1}: the gradient's norm is {mean['grad_norm']}; {LOWER_LR}"
                )
            mean["lr"] = lr
            now = time.monotonic()
            mean["tokens_per_s"] = step_tokens / (now - started)
            mean["rows_per_s"] = len(step.rows) / (now - started)
            self.step = step.index + 1
            stop = on_step(self.step, self.order.num_steps, mean)
            started = time.monotonic()
            if stop:
                return

    @torch.no_grad()
    def evaluate(self, rows: Sequence[TrainingRow], batch_size: int) -> Metrics:
        """Means over held-out rows, spread over the workers; empty when there are no rows."""
        if not len(rows):
            return {}
        training = self.engine.module.training
        self.engine.eval()
        share = list(range(self._rank, len(rows), self._world))
        sums: Metrics = {}
        # every worker makes as many calls: under ZeRO-3 each is an exchange
        calls = math.ceil(math.ceil(len(rows) / self._world) / batch_size)
        for call in range(calls):
            own = share[call * batch_size : (call + 1) * batch_size]
            batch = self._objective.collate([rows[i] for i in own or [0]]).to(self.engine.device)
            _, found = self._objective(self.engine, batch)
            if own:
                sums = {key: sums.get(key, 0.0) + value for key, value in found.items()}
        self.engine.train(training)
        return {key: value / len(rows) for key, value in self._total(sums).items()}

    def _plain_norm(self) -> torch.Tensor | None:
        """Norm of the step's gradients before clipping where DeepSpeed keeps none (stage 0 in float32); else None."""
        if self._section.zero_stage or self._dtype != "float32":
            return None
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _total(self, sums: Metrics) -> Metrics:
        """Sums over the workers; a worker that had no rows brings an empty dict."""
        if self._world == 1:
            return sums
        everyone: list[Any] = [None] * self._world
        dist.all_gather_object(everyone, sums)
        names = max(everyone, key=len)
        return {name: math.fsum(one.get(name, 0.0) for one in everyone) for name in names}


def _exchange_through_torch() -> None:
    """Keep DeepSpeed from its own all-reduce between CPU workers of one machine: a C++ extension that is compiled at first use.

    That takes 27 s on two cores, needs a compiler, and leaves 66 MiB of /dev/shm behind each worker (DeepSpeed 0.19).
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def schedule_factor(schedule: str, num_steps: int, warmup_frac: float) -> Callable[[int], float]:
    """The learning rate's factor in each step (from 0): a linear warm-up that starts above 0, then transformers' schedules."""
    warmup = round(num_steps * warmup_frac)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min((step - warmup) / max(1, num_steps - warmup), 1.0)
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if schedule == "linear" else 1.0

    return factor


def without_dropout(model: torch.nn.Module) -> None:
    """Switch off every dropout but LoRA's: policy and reference must see the same network, or the first loss is not ln 2."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        for key, value in vars(module).items():
            if isinstance(value, float) and (key == "dropout" or key.endswith("_dropout")):
                setattr(module, key, 0.0)
