"""The DeepSpeed config that the recipe's keys make, and a user's own JSON merged over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo4rec_ray.config.section import merged
from dpo4rec_ray.config.training import TrainerSection
from dpo4rec_ray.errors import UserError

# DeepSpeed's key -> the recipe's. The recipe owns these: a file that sets one to another value is refused.
OWNED = {
    "train_batch_size": "batch_size, gradient_accumulation_steps and num_workers",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "lr and weight_decay",
    "scheduler": "schedule and warmup_frac",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer": "offload_optimizer",
    "zero_optimization.offload_param": "offload_params",
    "bf16.enabled": "llm.dtype",
    "fp16.enabled": "llm.dtype",
    "amp.enabled": "llm.dtype",
    "torch_autocast.enabled": "llm.dtype",
    "managed_gradient_accumulation": "gradient_accumulation_steps",
}


def deepspeed_config(
    section: TrainerSection, dtype: str, gradient_accumulation_steps: int, extra: dict[str, Any]
) -> dict[str, Any]:
    """DeepSpeed's config for one training.

    Args:
        dtype: of the weights: "float32", "bfloat16" or "float16".
        gradient_accumulation_steps: of this training; the section's own value where all its workers take part.
        extra: what the recipe has no key for (see `read_extra`).
    """
    zero: dict[str, Any] = {"stage": section.zero_stage, "overlap_comm": section.on_gpu}
    if section.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": section.on_gpu}
    if section.offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": section.on_gpu}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": section.batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": section.max_grad_norm,
        "zero_optimization": zero,
        # torch's AdamW everywhere: DeepSpeed's own for offloaded states is compiled on first use, for minutes
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if dtype != "float32":
        config["bf16" if dtype == "bfloat16" else "fp16"] = {"enabled": True}
    # "auto" is transformers' word for "as the trainer has it"
    return merged(config, extra, unset="auto")


def read_extra(section: TrainerSection, dtype: str, where: str = "policy") -> dict[str, Any]:
    """The section's DeepSpeed file without the keys that the recipe owns; empty where it names no file.

    where: the section's name in the recipe, for errors.

    Raises:
        UserError: not a readable JSON object, or it sets one of the recipe's keys to another value.
    """
    path = section.deepspeed
    if not path:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}.deepspeed {path}: not a readable JSON file ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}.deepspeed {path}: must hold a JSON object, not {type(found).__name__}")
    config = deepspeed_config(section, dtype, section.gradient_accumulation_steps, {})
    for key, owner in OWNED.items():
        table, _, name = key.rpartition(".")
        inside = found.get(table, {}) if table else found
        if not isinstance(inside, dict):
            raise UserError(f"{where}.deepspeed {path}: {table} must be an object, not {json.dumps(inside)}")
        theirs, ours = inside.pop(name, None), _at(config, key)
        if theirs is None or theirs == "auto" or theirs == ours or (theirs is False and ours is None):
            continue
        raise UserError(
            f"{where}.deepspeed {path}: {key} = {json.dumps(theirs)} contradicts the recipe ({json.dumps(ours)}); "
            f"remove it from the file and set {owner} in the recipe"
        )
    return found


def _at(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
