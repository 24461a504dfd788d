"""A worker under Ray Train that trains the policy, evaluates it on held-out users, and saves the best."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.model import FULL, LORA, MERGED
from dpo4rec_ray.policy.objectives import Metrics
from dpo4rec_ray.policy.trainer import LOWER_LR, Trainer
from dpo4rec_ray.store.policies import merges_lora
from dpo4rec_ray.train.heldout import HELDOUT, HeldoutEvaluations, mixed
from dpo4rec_ray.train.learners import LEARNERS
from dpo4rec_ray.train.policy_task import Material, PolicyTask, Watcher
from dpo4rec_ray.train.resumable import Observer, quiet_deepspeed, run_resumable
from dpo4rec_ray.train.state import update_state
from dpo4rec_ray.workers.phases import FIRST_WORK, phase
from dpo4rec_ray.workers.placement import without_sklearn

WARNINGS = "warnings"  # key of a step's warnings in its line of metrics.jsonl


def policy_loop(arguments: dict[str, Any]) -> None:
    """Train, and write what the training came to into the state."""
    from ray import train

    without_sklearn()
    phase("importing DeepSpeed")
    from dpo4rec_ray.policy.logps import check_grouped
    from dpo4rec_ray.policy.model import save_merged
    from dpo4rec_ray.policy.reference_scorer import batch_layout

    quiet_deepspeed()
    task: PolicyTask = arguments["task"]
    section, dtype = task.config.policy, task.config.llm.dtype
    learner = LEARNERS[task.objective]
    material = learner.material(task)
    layout = batch_layout(task.base, section)
    objective = learner.objective(layout, task)
    phase(f"loading {Path(task.base).name}")
    trainer = Trainer(
        _policy(task, layout.grouped, objective.per_token),
        material.training,
        objective,
        section,
        dtype=dtype,
        seed=task.seed,
        lengths=material.lengths.tolist() if section.length_sorted else None,
        extra=task.deepspeed,
    )
    if layout.grouped:
        check_grouped(trainer.engine.module.model)
    rank = train.get_context().get_world_rank()
    watch = learner.watch(task.config, trainer.order.num_steps)
    observer = _PolicyObserver(task, trainer, material, watch, rank)
    phase(FIRST_WORK)
    run_resumable(
        trainer,
        section,
        task.folder,
        f"{task.config.run.name}-round{task.round_id}",
        observer,
        trackers=task.config.run.trackers,
        expect_first=learner.first_figure(task),
    )
    if rank == 0:
        if section.tuning == "lora" and merges_lora(task.config):
            # Here, as this process has imported all that it takes.
            save_merged(task.base, str(task.folder / LORA), task.folder / MERGED, dtype)
        result = {
            "rows": material.counts,
            "heldout": observer.evaluations.kept,
            "heldout_losses": observer.evaluations.losses,
        }
        update_state(task.folder, result=result)


class _PolicyObserver(Observer):
    """Warns, evaluates on the held-out users, saves the best policy, and stops when training no longer helps."""

    def __init__(
        self,
        task: PolicyTask,
        trainer: Trainer,
        material: Material,
        watch: Watcher,
        rank: int,
    ):
        self._task, self._trainer, self._rank = task, trainer, rank
        self._material, self._watch = material, watch
        self.evaluations = HeldoutEvaluations()

    def restore(self, line: dict[str, Any]) -> None:
        self._watch.see(line["step"], line)
        if HELDOUT in line:
            self.evaluations.add(line["step"], line[HELDOUT])

    def after_step(self, step: int, num_steps: int, metrics: Metrics) -> tuple[dict[str, Any], bool]:
        section = self._task.config.policy
        found = self._watch.see(step, metrics)
        more: dict[str, Any] = {WARNINGS: found} if found else {}
        if step < num_steps and step % (section.eval_every or self._trainer.order.steps_per_epoch):
            return more, False
        heldout = mixed(
            {
                kind: self._trainer.evaluate(rows, section.batch_size)
                for kind, rows in self._material.heldout.items()
            },
            self._material.trained,
        )
        if heldout and not math.isfinite(heldout["loss"]):
            raise UserError(f"step {step}: the loss on the held-out users is {heldout['loss']}; {LOWER_LR}")
        if self.evaluations.add(step, heldout):
            _save(self._task, self._trainer, self._rank)
        return {**more, HELDOUT: heldout}, self.evaluations.stopped(section.patience)


def _save(task: PolicyTask, trainer: Trainer, rank: int) -> None:
    """Save the policy as it is; every worker takes part."""
    import torch.distributed as dist

    from dpo4rec_ray.policy.model import gathered_state, save_complete, save_model

    model, full = trainer.engine.module.model, task.config.policy.tuning == "full"
    state = gathered_state(model, rank, trained_only=not full)
    if rank == 0:
        if full:
            save_complete(model, task.base, task.folder / FULL, state)
        else:
            save_model(model, task.base, task.folder / LORA, state)
    dist.barrier()


def _policy(task: PolicyTask, grouped: bool, per_token: bool) -> Any:
    """The model to train, ready for the trainer."""
    from dpo4rec_ray.policy.deepspeed_config import deepspeed_config
    from dpo4rec_ray.policy.logps import CompletionLogps
    from dpo4rec_ray.policy.model import add_lora, checkpoint_activations, load_lora, load_model

    section, dtype = task.config.policy, task.config.llm.dtype
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
    return CompletionLogps(
        model,
        grouped=grouped,
        chunk_tokens=section.chunk_tokens,
        per_token=per_token,
        temperature=task.temperature,
    )
