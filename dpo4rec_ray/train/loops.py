"""The Ray Train loops: DPO, and the supervised bootstrap; one trainer, two objectives."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.config.training import TrainerSection
from dpo4rec_ray.core.preference import SMOOTHED
from dpo4rec_ray.core.watch import Watch
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.deepspeed_config import TrainSettings
from dpo4rec_ray.policy.trainer import LESS, Figures, Trainer
from dpo4rec_ray.store.artifacts import RunDir, write_json
from dpo4rec_ray.store.metrics_file import MetricsFile, read_metrics
from dpo4rec_ray.train.launch import WARNINGS
from dpo4rec_ray.train.reference_logps import read_reference

HELDOUT = "heldout.json"  # figures of the saved policy on the held-out pairs
TRAINED = "trained.json"  # written last: the policy is saved
LOOKS = "looks.json"  # the held-out loss at every look
CONTINUED = "continued.txt"  # the steps from whose checkpoints a training went on
# How far a text's log-ratio may be from 0 before training, in nats: rounding, of sums over hundreds of tokens in batches of
# another shape. Times beta it is how far the first loss may be from ln 2.
FIRST_LOSS_NOISE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.2}
ADAPTER, FULL = "adapter", "full"


def train_settings(section: TrainerSection, dtype: str, seed: int) -> TrainSettings:
    return TrainSettings(
        lr=section.lr,
        epochs=section.epochs,
        batch_size=section.batch_size,
        effective=section.batch_size * section.gradient_accumulation_steps * section.num_workers,
        warmup_frac=section.warmup_frac,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        zero_stage=section.zero_stage,
        dtype=dtype,
        seed=seed,
        schedule=section.schedule,
        offload_optimizer=section.offload_optimizer,
        offload_params=section.offload_params,
        on_gpu=section.gpus_per_worker > 0,
    )


@dataclass(frozen=True)
class DPOTask:
    """What a DPO worker needs to know."""

    config: Config
    store: RunDir
    round_id: int
    folder: str
    base: str  # the model that training starts from
    adapter: str | None  # a LoRA on it that is trained on
    reference: str | None  # folder of the stored log-probabilities; None: the model with its LoRA off
    moved: bool  # the start is not the reference, so the first loss is not ln 2
    settings: TrainSettings
    deepspeed: dict[str, Any]


def dpo_loop(arguments: dict[str, Any]) -> None:
    """One DPO worker: trains on the round's pairs, looks at the held-out ones, and rank 0 saves."""
    from ray import train

    from dpo4rec_ray.policy.logps import check_grouped
    from dpo4rec_ray.policy.objectives import DPOObjective
    from dpo4rec_ray.policy.reference_scorer import batch_layout
    from dpo4rec_ray.policy.rows import ArrowRows

    _quiet()
    task: DPOTask = arguments["task"]
    section, settings, folder = task.config.dpo, task.settings, Path(task.folder)
    rank = train.get_context().get_world_rank()
    pairs, lengths, counts, max_length = _pairs(task)
    layout = batch_layout(
        task.base,
        prefix_sharing=section.prefix_sharing,
        packing=section.packing,
        on_gpu=settings.on_gpu,
    )
    objective = DPOObjective(layout, section.beta, section.loss, section.label_smoothing, section.nll_weight)
    rows = {split: ArrowRows(table) for split, table in pairs.items()}
    del pairs  # a copy in many pieces
    if section.patience and not len(rows["valid"]):
        raise UserError("dpo.patience needs held-out pairs, and there are none; set it to 0")
    if rank == 0:
        (folder / TRAINED).unlink(missing_ok=True)
    trainer = Trainer(
        _policy(task, layout.grouped),
        rows["train"],
        objective,
        settings,
        lengths=lengths["train"] if section.length_sorted else None,
        extra=task.deepspeed,
    )
    if layout.grouped:
        check_grouped(trainer.engine.module.model)
    # each pair's loss is ln 2 where policy equals reference
    exact = section.loss in SMOOTHED and not task.moved and not section.nll_weight
    saver = _Saver(task, trainer, rank)
    looks = Looks(folder, rank)

    def look(step: int) -> bool:
        """Judge the policy on the held-out pairs and keep it if it is the best; whether it is time to stop."""
        heldout = trainer.evaluate(rows["valid"], section.batch_size)
        if heldout and not math.isfinite(heldout["loss"]):
            raise UserError(f"step {step}: the loss on the held-out pairs is {heldout['loss']}; {LESS}")
        best = looks.add(step, heldout.get("loss", math.nan))
        if best or not heldout:
            saver.save(heldout)
        return bool(section.patience) and looks.since_best >= section.patience

    def on_step(step: int, num_steps: int, stats: Figures) -> bool:
        last = step == num_steps
        return look(step) if not last and section.eval_every and step % section.eval_every == 0 else False

    _fit(
        trainer,
        section,
        folder,
        f"{task.config.run.name}-round{task.round_id}",
        Watch(trainer.order.num_steps, section.max_kl_per_token).see,
        on_step,
        expect_first_loss=(math.log(2), FIRST_LOSS_NOISE[settings.dtype] * max(section.beta, 0.1))
        if exact
        else None,
    )
    if not looks.stopped(section.patience):
        if not section.eval_every:
            looks.forget()
        look(trainer.order.num_steps)
    if rank == 0:
        continued = (folder / CONTINUED).read_text().split() if (folder / CONTINUED).exists() else []
        trained = {
            "pairs": counts,
            "max_length": max_length,
            "looks": looks.losses,
            "continued_after": [int(step) for step in continued],
        }
        write_json(folder / TRAINED, trained)


def supervised_loop(arguments: dict[str, Any]) -> None:
    """One supervised worker: a model from scratch on (prompt, text) rows, saved complete by rank 0."""
    import pyarrow.parquet as pq
    import torch
    from ray import train
    from transformers import AutoModelForCausalLM

    from dpo4rec_ray.policy.logps import CompletionLogps
    from dpo4rec_ray.policy.model import gathered_state, load_tokenizer, save_complete
    from dpo4rec_ray.policy.objectives import BatchLayout, SupervisedObjective
    from dpo4rec_ray.policy.rows import ArrowRows
    from dpo4rec_ray.policy.small_llm import small_llama_config

    _quiet()
    settings: TrainSettings = arguments["settings"]
    config: Config = arguments["config"]
    rank = train.get_context().get_world_rank()
    tokenizer = load_tokenizer(arguments["tokenizer"])
    torch.manual_seed(settings.seed)  # every rank starts from the same weights
    model = AutoModelForCausalLM.from_config(
        small_llama_config(
            len(tokenizer),
            hidden_size=config.bootstrap.hidden_size,
            num_layers=config.bootstrap.num_layers,
        )
    )
    objective = SupervisedObjective(BatchLayout(tokenizer.pad_token_id))
    rows = ArrowRows(pq.read_table(arguments["rows"]))
    trainer = Trainer(CompletionLogps(model), rows, objective, settings, extra=arguments["deepspeed"])
    folder = Path(arguments["folder"])
    _fit(trainer, config.bootstrap, folder, f"{config.run.name}-bootstrap", lambda *_: [], lambda *_: False)
    state = gathered_state(model, rank, trained_only=False)
    if rank == 0:
        save_complete(model, arguments["tokenizer"], Path(arguments["target"]), state)


def _fit(
    trainer: Trainer,
    section: TrainerSection,
    folder: Path,
    run_name: str,
    warnings_of: Callable[[int, Figures], list[str]],
    on_step: Callable[[int, int, Figures], bool],
    *,
    expect_first_loss: tuple[float, float] | None = None,
) -> None:
    """Run the trainer: continue from Ray Train's checkpoint if there is one, save others, and keep the figures."""
    from ray import train

    from dpo4rec_ray.policy.trackers import TRACKERS

    rank = train.get_context().get_world_rank()
    checkpoint = train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as saved:
            trainer.load(Path(saved))
        if rank == 0:
            with open(folder / CONTINUED, "a", encoding="utf-8") as lines:
                lines.write(f"{trainer.step}\n")
    metrics = MetricsFile(folder, rank)
    metrics.go_on_after(trainer.step)
    trackers = []
    if rank == 0:
        settings = section.model_dump(mode="json")
        trackers = [TRACKERS[name](folder, run_name, settings) for name in section.trackers]
        for line in read_metrics(folder):  # what a continued training has seen
            warnings_of(line["step"], line)

    def after_step(step: int, num_steps: int, stats: Figures) -> bool:
        own = {**stats, "peak_memory_mb": _peak_memory_mb()}
        found = warnings_of(step, own) if rank == 0 else []
        metrics.write({"step": step, "num_steps": num_steps, **own, **({WARNINGS: found} if found else {})})
        for tracker in trackers:
            tracker.log(step, own)
        stop = on_step(step, num_steps, stats)
        if step % section.checkpoint_every == 0 and step < num_steps and not stop:
            with tempfile.TemporaryDirectory() as place:
                trainer.save(Path(place))
                train.report({"step": step}, checkpoint=train.Checkpoint.from_directory(place))
        return stop

    trainer.run(after_step, expect_first_loss=expect_first_loss)
    for tracker in trackers:
        tracker.close()


class Looks:
    """The held-out losses so far; rank 0 keeps them for a training that is continued."""

    def __init__(self, folder: Path, rank: int):
        self._file, self._rank = folder / LOOKS, rank
        self.losses: dict[int, float] = {}
        if self._file.exists():
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            self.losses = {int(step): math.nan if loss is None else loss for step, loss in stored.items()}

    def add(self, step: int, loss: float) -> bool:
        """Note a look; whether none was better. Looks beyond the step a training continued from are redone."""
        self.losses = {known: value for known, value in self.losses.items() if known < step}
        best = all(not loss > other for other in self.losses.values())
        self.losses[step] = loss
        if self._rank == 0:
            write_json(self._file, self.losses)
        return best

    def forget(self) -> None:
        self.losses = {}

    @property
    def since_best(self) -> int:
        """Looks after the best one."""
        steps = sorted(self.losses)
        best = min(steps, key=lambda step: (self.losses[step], step))
        return len(steps) - 1 - steps.index(best)

    def stopped(self, patience: int) -> bool:
        return bool(patience and self.losses) and self.since_best >= patience


class _Saver:
    """Saves the policy as it is, with its figures on the held-out pairs; every worker takes part."""

    def __init__(self, task: DPOTask, trainer: Trainer, rank: int):
        self._task, self._trainer, self._rank = task, trainer, rank

    def save(self, heldout: Figures) -> None:
        import torch.distributed as dist

        from dpo4rec_ray.policy.model import gathered_state, save_adapter, save_complete

        model, folder = self._trainer.engine.module.model, Path(self._task.folder)
        full = self._task.config.dpo.tuning == "full"
        state = gathered_state(model, self._rank, trained_only=not full)
        if self._rank == 0:
            if full:
                save_complete(model, self._task.base, folder / FULL, state)
            else:
                save_adapter(model, state, self._task.base, folder / ADAPTER)
            write_json(folder / HELDOUT, heldout)
        dist.barrier()


def _policy(task: DPOTask, grouped: bool) -> Any:
    """The model to train, ready for the trainer."""
    from dpo4rec_ray.policy.deepspeed_config import deepspeed_config
    from dpo4rec_ray.policy.logps import CompletionLogps
    from dpo4rec_ray.policy.model import add_lora, checkpoint_activations, load_lora, load_model

    section, settings = task.config.dpo, task.settings
    sharded = settings.zero_stage == 3
    zero3 = deepspeed_config(settings, 1, task.deepspeed) if sharded else None
    model: Any = load_model(task.base, settings.dtype, zero3=zero3, quantize=section.quantize)
    if section.tuning == "lora":
        if task.adapter:
            model = load_lora(model, task.adapter)
        else:
            import torch

            torch.manual_seed(settings.seed)  # every worker draws the same LoRA
            model = add_lora(
                model,
                section.lora_rank,
                section.lora_alpha,
                section.lora_dropout,
                section.lora_targets,
                section.lora_init,
            )
    if section.activation_checkpointing:
        checkpoint_activations(model)
    return CompletionLogps(model, grouped=grouped, chunk_tokens=section.chunk_tokens)


def _pairs(task: DPOTask) -> tuple[dict[str, pa.Table], dict[str, np.ndarray], dict[str, int], int]:
    """The round's pairs by split, less those that are too long; their lengths; counts of both; and the limit."""
    from dpo4rec_ray.policy.rows import pair_lengths, with_reference

    columns = ["user_id", "split", "prompt_token_ids", "chosen_token_ids", "rejected_token_ids"]
    pairs = task.store.read("pairs", task.round_id, columns=columns)
    if task.reference:
        pairs = with_reference(pairs, read_reference(task.reference))
    max_length = task.config.dpo.max_length or task.config.llm.max_model_len
    total, longest = pair_lengths(pairs)
    splits = np.asarray(pairs["split"])
    tables, lengths, counts = {}, {}, {}
    for split in ("train", "valid"):
        chosen = (splits == split) & (longest <= max_length)
        tables[split] = pairs.filter(pa.array(chosen))
        lengths[split] = total[chosen]
        counts[split] = int(chosen.sum())
        counts[f"{split}_too_long"] = int(((splits == split) & (longest > max_length)).sum())
    return tables, lengths, counts, max_length


def _quiet() -> None:
    """DeepSpeed logs every detail at INFO; only errors matter here."""
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)


def _peak_memory_mb() -> float:
    """Peak device memory of this rank, or on the CPU the peak resident size of its process."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
