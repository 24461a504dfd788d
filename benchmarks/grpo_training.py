"""One measured GRPO training: python benchmarks/grpo_training.py reference|trl|ours SPEC (JSON). Prints one JSON line.

On the model and texts that `dpo_training.py make` writes, with N - 1 rejected texts: a pair's texts are the group of a prompt,
with rewards drawn at random. trl: TRL's GRPOTrainer, given these groups in place of what it would generate; ours: this
project's trainer. Both take the prompts of every step in the same order and start from the same LoRA; the log-probabilities of
the policy that drew the texts are given to both.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from dpo_training import LORA, memory_mb, rates

from dpo4rec_ray.config.training import GRPOSection, PolicySection
from dpo4rec_ray.core.policy_gradient import advantages

REFERENCE = "token_logps.parquet"
DTYPE = "float32"


def main() -> int:
    what, spec = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps({"reference": run_reference, "trl": run_trl, "ours": run_ours}[what](spec)))
    return 0


def groups(folder: Path) -> list[dict[str, Any]]:
    """Rows of `GRPOObjective`, with the stored log-probabilities if there are any."""
    rng = np.random.default_rng(0)
    found = []
    for pair in pq.read_table(folder / "pairs.parquet").to_pylist():
        completions = [pair["chosen_token_ids"], *pair["rejected_token_ids"]]
        own = advantages(rng.normal(size=len(completions)), "std")
        assert own is not None
        found.append(
            {
                "prompt_token_ids": pair["prompt_token_ids"],
                "completions": completions,
                "advantages": own.tolist(),
            }
        )
    if (folder / REFERENCE).exists():
        for row, logps in zip(found, pq.read_table(folder / REFERENCE)["logps"].to_pylist(), strict=True):
            row["sampler_logps"] = logps
    return found


def run_reference(spec: dict[str, Any]) -> dict[str, Any]:
    """Write the log-probabilities of all texts' tokens beside the pairs."""
    from dpo4rec_ray.policy.groups import Group
    from dpo4rec_ray.policy.reference_scorer import ReferenceScorer

    folder, began = Path(spec["folder"]), time.monotonic()
    scorer = ReferenceScorer(str(folder), DTYPE, PolicySection(), per_token=True)
    found = scorer([Group(row["prompt_token_ids"], row["completions"]) for row in groups(folder)])
    table = pa.table({"logps": pa.array(found, pa.list_(pa.list_(pa.float32())))})
    pq.write_table(table, folder / REFERENCE)
    return {"prompts": len(found), "seconds": round(time.monotonic() - began, 1)}


def run_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """Args of spec: folder, steps, longest; keys of [policy] and [grpo]."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE="1", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(spec["port"]))
    import logging

    import torch
    import torch.distributed as dist
    from deepspeed.utils import logger

    from dpo4rec_ray.policy.logps import CompletionLogps
    from dpo4rec_ray.policy.model import add_lora, load_model
    from dpo4rec_ray.policy.objectives import GRPOObjective
    from dpo4rec_ray.policy.reference_scorer import batch_layout
    from dpo4rec_ray.policy.trainer import Trainer

    logger.setLevel(logging.ERROR)
    dist.init_process_group("gloo", rank=0, world_size=1)
    folder = Path(spec["folder"])
    section = PolicySection(
        schedule="constant",
        epochs=1,
        warmup_frac=0.0,
        num_workers=1,
        **LORA,
        **{key: value for key, value in spec.items() if key in PolicySection.model_fields},
    )
    grpo = GRPOSection(**{key: value for key, value in spec.items() if key in GRPOSection.model_fields})
    layout = batch_layout(str(folder), section)
    torch.manual_seed(0)
    inner = add_lora(load_model(str(folder), DTYPE), section)
    model = CompletionLogps(inner, grouped=layout.grouped, chunk_tokens=section.chunk_tokens, per_token=True)
    objective = GRPOObjective(layout, grpo, spec["longest"])
    trainer = Trainer(model, groups(folder), objective, section, dtype=DTYPE, seed=0)
    steps: list[dict[str, float]] = []
    times = [time.monotonic()]
    before = memory_mb()

    def on_step(step: int, num_steps: int, stats: dict[str, float]) -> bool:
        steps.append(stats)
        times.append(time.monotonic())
        return step == spec["steps"]

    trainer.run(on_step)
    return {
        **rates(spec, times),
        "losses": [one["loss"] for one in steps],
        "grad_norms": [one["grad_norm"] for one in steps],
        "peak_mb": round(memory_mb()),
        "before_mb": round(before),
    }


def run_trl(spec: dict[str, Any]) -> dict[str, Any]:
    """The same with TRL: a micro-step is batch_size prompts with their N texts."""
    import torch
    import trl_peer
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from dpo4rec_ray.policy.order import StepOrder

    folder = Path(spec["folder"])
    rows = groups(folder)
    per_prompt, accumulated = len(rows[0]["completions"]), spec["gradient_accumulation_steps"]
    order = StepOrder(len(rows), spec["batch_size"] * accumulated, 1, seed=0)
    micro_batches = iter([share for step in order.steps(spec["batch_size"], 0, 1) for share in step.shares])
    losses: list[float] = []

    class Given(GRPOTrainer):
        """Takes the groups in the order of our trainer in place of generating."""

        def _prepare_inputs(self, generation_batch: Any) -> Any:
            return inputs_of([rows[i] for i in next(micro_batches)])

        def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **options)
            losses.append(loss.item())
            return loss

    clock = trl_peer.Clock()
    trainer = Given(
        model=spec["folder"],
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            num_generations=per_prompt,
            max_completion_length=spec["longest"],
            loss_type="grpo",
            epsilon=spec["clip_low"],
            beta=0.0,
            temperature=1.0,
            per_device_train_batch_size=spec["batch_size"] * per_prompt,
            **trl_peer.arguments(spec, DTYPE),
        ),
        train_dataset=Dataset.from_list([{"prompt": "w9"}] * len(rows) * per_prompt),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=trl_peer.lora_config(),
        callbacks=[clock],
    )
    trainer.beta = spec["kl_weight"]  # set here: the constructor would load a reference that is given
    trl_peer.start_as_ours(trainer.model, spec["folder"], DTYPE)
    before = memory_mb()
    trainer.train()
    return {
        **rates(spec, clock.times),
        "losses": trl_peer.sums_of(losses, accumulated),
        "grad_norms": clock.norms,
        "peak_mb": round(memory_mb()),
        "before_mb": round(before),
    }


def inputs_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What GRPOTrainer._compute_loss reads: prompts padded on the left, texts on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def padded(sequences: list[list[Any]], dtype: Any, side: str) -> torch.Tensor:
        return pad_sequence(
            [torch.tensor(one, dtype=dtype) for one in sequences], batch_first=True, padding_side=side
        )

    texts = [(row["prompt_token_ids"], one) for row in rows for one in row["completions"]]
    prompts, completions = [prompt for prompt, _ in texts], [one for _, one in texts]
    logps = padded([one for row in rows for one in row["sampler_logps"]], torch.float32, "right")
    return {
        "prompt_ids": padded(prompts, torch.long, "left"),
        "prompt_mask": padded([[1] * len(one) for one in prompts], torch.long, "left"),
        "completion_ids": padded(completions, torch.long, "right"),
        "completion_mask": padded([[1] * len(one) for one in completions], torch.long, "right"),
        "advantages": torch.tensor([one for row in rows for one in row["advantages"]]),
        "old_per_token_logps": logps,
        "ref_per_token_logps": logps,
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }


if __name__ == "__main__":
    sys.exit(main())
