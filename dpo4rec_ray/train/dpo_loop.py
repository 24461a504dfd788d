"""A DPO worker under Ray Train: trains on the round's pairs, evaluates on the held-out ones, and saves the best policy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.pairing import Kind
from dpo4rec_ray.core.preference import SMOOTHED
from dpo4rec_ray.core.watch import Watch
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.objectives import Metrics
from dpo4rec_ray.policy.rows import ArrowRows, pair_lengths, with_reference
from dpo4rec_ray.policy.trainer import LOWER_LR, Trainer
from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.policies import merges_lora
from dpo4rec_ray.train.heldout import HELDOUT, HeldoutEvaluations, mixed
from dpo4rec_ray.train.reference_logps import read_reference
from dpo4rec_ray.train.resumable import Observer, quiet_deepspeed, run_resumable
from dpo4rec_ray.train.state import update_state
from dpo4rec_ray.workers.phases import FIRST_WORK, phase
from dpo4rec_ray.workers.placement import without_sklearn

LORA, FULL, MERGED = "lora", "full", "merged"  # folders of the saved weights
KINDS = tuple(kind.value for kind in Kind)
WARNINGS = "warnings"  # key of a step's warnings in its line of metrics.jsonl
# How far a text's log-ratio may be from 0 before training, in nats. It is rounding: sums over hundreds of tokens, in batches
# of another shape. Times beta it is how far the first loss may be from ln 2.
FIRST_LOSS_NOISE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.2}


@dataclass(frozen=True)
class DPOTask:
    """What a DPO worker needs to know.

    Attributes:
        seed: of the order of the pairs and of the LoRA's first weights.
        base: the model that training starts from.
        lora: a LoRA on the base that is trained further; None: a new one.
        reference: folder of the stored log-probabilities; None: the reference is the model with its LoRA off.
        moved: the start is not the reference, so the first loss is not ln 2.
        deepspeed: content of the user's DeepSpeed file.
    """

    config: Config
    store: RunDir
    round_id: int
    seed: int
    base: str
    lora: str | None
    reference: str | None
    moved: bool
    deepspeed: dict[str, Any]

    @property
    def folder(self) -> Place:
        return self.store.path("policy", self.round_id)


def dpo_loop(arguments: dict[str, Any]) -> None:
    """Train, and write what the training came to into the state."""
    from ray import train

    without_sklearn()
    phase("importing DeepSpeed")
    from dpo4rec_ray.policy.logps import check_grouped
    from dpo4rec_ray.policy.model import save_merged
    from dpo4rec_ray.policy.objectives import DPOObjective
    from dpo4rec_ray.policy.reference_scorer import batch_layout

    quiet_deepspeed()
    task: DPOTask = arguments["task"]
    section, dtype = task.config.dpo, task.config.llm.dtype
    pairs, lengths, counts, max_length = _pairs(task)
    layout = batch_layout(task.base, section)
    training, trained = ArrowRows(pairs["train"]), _kinds(pairs["train"])
    kinds = np.asarray(pairs["valid"]["kind"])
    heldout = {kind: ArrowRows(pairs["valid"].filter(pa.array(kinds == kind))) for kind in KINDS}
    del pairs  # a copy in many pieces
    phase(f"loading {Path(task.base).name}")
    trainer = Trainer(
        _policy(task, layout.grouped),
        training,
        DPOObjective(layout, section),
        section,
        dtype=dtype,
        seed=task.seed,
        lengths=lengths["train"] if section.length_sorted else None,
        extra=task.deepspeed,
    )
    if layout.grouped:
        check_grouped(trainer.engine.module.model)
    # each pair's loss is ln 2 where policy equals reference
    exact = section.loss in SMOOTHED and not task.moved and not section.nll_weight
    noise = FIRST_LOSS_NOISE[dtype] * max(section.beta, 0.1)
    rank = train.get_context().get_world_rank()
    observer = _DPOObserver(task, trainer, heldout, trained, rank)
    phase(FIRST_WORK)
    run_resumable(
        trainer,
        section,
        task.folder,
        f"{task.config.run.name}-round{task.round_id}",
        observer,
        expect_first_loss=(math.log(2), noise) if exact else None,
    )
    if rank == 0:
        if section.tuning == "lora" and merges_lora(task.config):
            # Here, as this process has imported all that it takes.
            save_merged(task.base, str(task.folder / LORA), task.folder / MERGED, dtype)
        result = {
            "pairs": counts,
            "max_length": max_length,
            "heldout": observer.evaluations.kept,
            "heldout_losses": observer.evaluations.losses,
        }
        update_state(task.folder, result=result)


class _DPOObserver(Observer):
    """Warns, evaluates on the held-out pairs, saves the best policy, and stops when training no longer helps."""

    def __init__(
        self,
        task: DPOTask,
        trainer: Trainer,
        heldout: dict[str, ArrowRows],
        trained: dict[str, int],
        rank: int,
    ):
        """heldout: rows of each kind of pair; trained: training pairs of each kind."""
        self._task, self._trainer, self._rank = task, trainer, rank
        self._heldout, self._trained = heldout, trained
        self._watch = Watch(trainer.order.num_steps, task.config.dpo.max_kl_per_token)
        self.evaluations = HeldoutEvaluations()

    def restore(self, line: dict[str, Any]) -> None:
        self._watch.see(line["step"], line)
        if HELDOUT in line:
            self.evaluations.add(line["step"], line[HELDOUT])

    def after_step(self, step: int, num_steps: int, metrics: Metrics) -> tuple[dict[str, Any], bool]:
        section = self._task.config.dpo
        found = self._watch.see(step, metrics)
        more: dict[str, Any] = {WARNINGS: found} if found else {}
        if step < num_steps and step % (section.eval_every or self._trainer.order.steps_per_epoch):
            return more, False
        heldout = mixed(
            {kind: self._trainer.evaluate(rows, section.batch_size) for kind, rows in self._heldout.items()},
            self._trained,
        )
        if heldout and not math.isfinite(heldout["loss"]):
            raise UserError(f"step {step}: the loss on the held-out pairs is {heldout['loss']}; {LOWER_LR}")
        if self.evaluations.add(step, heldout):
            _save(self._task, self._trainer, self._rank)
        return {**more, HELDOUT: heldout}, self.evaluations.stopped(section.patience)


def _save(task: DPOTask, trainer: Trainer, rank: int) -> None:
    """Save the policy as it is; every worker takes part."""
    import torch.distributed as dist

    from dpo4rec_ray.policy.model import gathered_state, save_complete, save_model

    model, full = trainer.engine.module.model, task.config.dpo.tuning == "full"
    state = gathered_state(model, rank, trained_only=not full)
    if rank == 0:
        if full:
            save_complete(model, task.base, task.folder / FULL, state)
        else:
            save_model(model, task.base, task.folder / LORA, state)
    dist.barrier()


def _policy(task: DPOTask, grouped: bool) -> Any:
    """The model to train, ready for the trainer."""
    from dpo4rec_ray.policy.deepspeed_config import deepspeed_config
    from dpo4rec_ray.policy.logps import CompletionLogps
    from dpo4rec_ray.policy.model import add_lora, checkpoint_activations, load_lora, load_model

    section, dtype = task.config.dpo, task.config.llm.dtype
    zero3 = deepspeed_config(section, dtype, 1, task.deepspeed) if section.zero_stage == 3 else None
    model: Any = load_model(task.base, dtype, zero3=zero3, quantize=section.quantize)
    if section.tuning == "lora":
        if task.lora:
            model = load_lora(model, task.lora)
        else:
            import torch

            torch.manual_seed(task.seed)  # every worker draws the same LoRA
            model = add_lora(model, section)
    if section.activation_checkpointing:
        checkpoint_activations(model)
    return CompletionLogps(model, grouped=grouped, chunk_tokens=section.chunk_tokens)


def _pairs(task: DPOTask) -> tuple[dict[str, pa.Table], dict[str, np.ndarray], dict[str, int], int]:
    """The round's pairs by split without those that are too long; their lengths; counts of both; and the limit in tokens."""
    columns = ["user_id", "split", "kind", "prompt_token_ids", "chosen_token_ids", "rejected_token_ids"]
    pairs = task.store.read("pairs", task.round_id, columns=columns)
    if task.reference:
        pairs = with_reference(pairs, read_reference(task.reference))
    max_length = task.config.max_pair_tokens
    total, longest = pair_lengths(pairs)
    splits = np.asarray(pairs["split"])
    tables, lengths, counts = {}, {}, {}
    for split in ("train", "valid"):
        chosen = (splits == split) & (longest <= max_length)
        tables[split] = pairs.filter(pa.array(chosen))
        lengths[split] = total[chosen]
        counts[split] = int(chosen.sum())
        counts |= {f"{split}_{kind}": count for kind, count in _kinds(tables[split]).items()}
        counts[f"{split}_too_long"] = int(((splits == split) & (longest > max_length)).sum())
    return tables, lengths, counts, max_length


def _kinds(pairs: pa.Table) -> dict[str, int]:
    """How many pairs there are of each kind."""
    kinds = np.asarray(pairs["kind"])
    return {kind: int((kinds == kind).sum()) for kind in KINDS}
