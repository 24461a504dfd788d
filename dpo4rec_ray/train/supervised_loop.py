"""A supervised worker under Ray Train: a model from scratch on (prompt, text) rows, for the bootstrap."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo4rec_ray.config import Config
from dpo4rec_ray.train.resumable import Observer, quiet_deepspeed, run_resumable


@dataclass(frozen=True)
class SupervisedTask:
    """What a supervised worker needs to know.

    Attributes:
        deepspeed: content of the user's DeepSpeed file.
        tokenizer: its folder.
        rows: Parquet file with the columns prompt_token_ids and completion_token_ids.
        folder: of the state and the metrics.
        target: the model's folder, written by rank 0.
    """

    config: Config
    seed: int
    deepspeed: dict[str, Any]
    tokenizer: str
    rows: str
    folder: str
    target: str


def supervised_loop(arguments: dict[str, Any]) -> None:
    """Train on the rows, and save the complete model."""
    import pyarrow.parquet as pq
    import torch
    from ray import train
    from transformers import AutoModelForCausalLM

    from dpo4rec_ray.policy.logps import CompletionLogps
    from dpo4rec_ray.policy.model import gathered_state, load_tokenizer, save_complete
    from dpo4rec_ray.policy.objectives import BatchLayout, SupervisedObjective
    from dpo4rec_ray.policy.rows import ArrowRows
    from dpo4rec_ray.policy.small_llm import small_llama_config
    from dpo4rec_ray.policy.trainer import Trainer

    quiet_deepspeed()
    task: SupervisedTask = arguments["task"]
    section = task.config.bootstrap
    rank = train.get_context().get_world_rank()
    tokenizer = load_tokenizer(task.tokenizer)
    torch.manual_seed(task.seed)  # every worker starts from the same weights
    model = AutoModelForCausalLM.from_config(small_llama_config(len(tokenizer), section))
    trainer = Trainer(
        CompletionLogps(model),
        ArrowRows(pq.read_table(task.rows)),
        SupervisedObjective(BatchLayout(tokenizer.pad_token_id)),
        section,
        dtype="float32",
        seed=task.seed,
        extra=task.deepspeed,
    )
    run_resumable(trainer, section, Path(task.folder), f"{task.config.run.name}-bootstrap", Observer())
    state = gathered_state(model, rank, trained_only=False)
    if rank == 0:
        save_complete(model, task.tokenizer, Path(task.target), state)
