"""A supervised worker under Ray Train: a model from scratch on (prompt, text) rows, for the bootstrap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpo4rec_ray.config import Config
from dpo4rec_ray.storage.parquet import read_parquet
from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.train.resumable import Observer, quiet_deepspeed, run_resumable
from dpo4rec_ray.workers.phases import FIRST_WORK, phase
from dpo4rec_ray.workers.placement import without_sklearn

# Below a task's folder: the tokenizer, a Parquet file with the columns prompt_token_ids and completion_token_ids, and the
# model, which rank 0 writes.
WORK, TOKENIZER, ROWS, MODEL = "work", "work/tokenizer", "work/rows.parquet", "work/model"


@dataclass(frozen=True)
class SupervisedTask:
    """What a supervised worker needs to know. deepspeed: content of the user's DeepSpeed file; folder: of the state too."""

    config: Config
    seed: int
    deepspeed: dict[str, Any]
    folder: Place


def supervised_loop(arguments: dict[str, Any]) -> None:
    """Train on the rows, and save the complete model."""
    without_sklearn()
    phase("importing DeepSpeed")
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
    phase(FIRST_WORK)
    tokenizer = load_tokenizer(str(task.folder / TOKENIZER))
    torch.manual_seed(task.seed)  # every worker starts from the same weights
    model = AutoModelForCausalLM.from_config(small_llama_config(len(tokenizer), section))
    trainer = Trainer(
        CompletionLogps(model),
        ArrowRows(read_parquet(task.folder / ROWS)),
        SupervisedObjective(BatchLayout(tokenizer.pad_token_id)),
        section,
        dtype="float32",
        seed=task.seed,
        extra=task.deepspeed,
    )
    run = task.config.run
    run_resumable(trainer, section, task.folder, f"{run.name}-bootstrap", Observer(), trackers=run.trackers)
    state = gathered_state(model, rank, trained_only=False)
    if rank == 0:
        save_complete(model, str(task.folder / TOKENIZER), task.folder / MODEL, state)
