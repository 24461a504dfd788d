"""The Ray Train loop that runs both DPO and the supervised bootstrap: same trainer, another objective."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from dpo4rec_ray.artifacts import RunDir
from dpo4rec_ray.config import TrainerSection
from dpo4rec_ray.policy.trainer import TrainSettings
from dpo4rec_ray.stages.training import MetricsFile

HELDOUT = "heldout.json"


def train_settings(section: TrainerSection, dtype: str, seed: int) -> TrainSettings:
    return TrainSettings(
        lr=section.lr,
        epochs=section.epochs,
        batch_size=section.batch_size,
        accumulation=section.accumulation,
        warmup_frac=section.warmup_frac,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        zero_stage=section.zero_stage,
        dtype=dtype,
        seed=seed,
    )


def dpo_loop(arguments: dict[str, Any]) -> None:
    """One DPO worker: `base` + LoRA on the round's training pairs, then the held-out pairs, then rank 0 saves."""
    from ray import train

    from dpo4rec_ray.policy.model import add_lora, load_lora, load_model, load_tokenizer
    from dpo4rec_ray.policy.trainer import DPOObjective, evaluate_pairs
    from dpo4rec_ray.policy.trainer import train as train_model

    _quiet()
    settings: TrainSettings = arguments["settings"]
    store: RunDir = arguments["store"]
    folder, rank = Path(arguments["folder"]), train.get_context().get_world_rank()
    tokenizer = load_tokenizer(arguments["base"])
    base = load_model(arguments["base"], settings.dtype)
    if arguments["continue_from"]:
        model, expected = load_lora(base, arguments["continue_from"]), None  # the policy has moved: not ln 2
    else:
        model, expected = add_lora(base, arguments["lora_rank"], arguments["lora_alpha"]), math.log(2)
    objective = DPOObjective(tokenizer.pad_token_id or 0, arguments["beta"])
    pairs = {
        split: store.read("pairs", arguments["round_id"], split=split).to_pylist()
        for split in ("train", "valid")
    }
    metrics = MetricsFile(folder, rank)

    def on_step(step: int, num_steps: int, figures: dict[str, float]) -> None:
        metrics.write({"step": step, "num_steps": num_steps, **figures, "peak_memory_mb": _peak_memory_mb()})

    train_model(model, pairs["train"], objective, settings, on_step=on_step, expect_first_loss=expected)
    heldout = evaluate_pairs(model, pairs["valid"], objective, settings.batch_size)
    if rank == 0:
        model.save_pretrained(folder / "adapter")
        tokenizer.save_pretrained(folder / "adapter")
        (folder / HELDOUT).write_text(json.dumps(heldout), encoding="utf-8")


def supervised_loop(arguments: dict[str, Any]) -> None:
    """One supervised worker: a model from scratch on (prompt, text) rows, saved complete by rank 0."""
    import pyarrow.parquet as pq
    import torch
    from ray import train
    from transformers import AutoModelForCausalLM

    from dpo4rec_ray.policy.bootstrap import small_llama_config
    from dpo4rec_ray.policy.model import load_tokenizer, save_complete
    from dpo4rec_ray.policy.trainer import SupervisedObjective
    from dpo4rec_ray.policy.trainer import train as train_model

    _quiet()
    settings: TrainSettings = arguments["settings"]
    rank = train.get_context().get_world_rank()
    tokenizer = load_tokenizer(arguments["tokenizer"])
    torch.manual_seed(settings.seed)  # every rank starts from the same weights
    config = small_llama_config(
        len(tokenizer), hidden_size=arguments["hidden_size"], num_layers=arguments["num_layers"]
    )
    model = AutoModelForCausalLM.from_config(config)
    metrics = MetricsFile(arguments["folder"], rank)

    def on_step(step: int, num_steps: int, figures: dict[str, float]) -> None:
        metrics.write({"step": step, "num_steps": num_steps, **figures})

    objective = SupervisedObjective(tokenizer.pad_token_id)
    rows = pq.read_table(arguments["rows"]).to_pylist()
    train_model(model, rows, objective, settings, on_step=on_step)
    if rank == 0:
        save_complete(model, arguments["tokenizer"], Path(arguments["target"]))


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
