"""The DeepSpeed config that the recipe's keys make, and a user's own JSON merged over it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo4rec_ray.errors import UserError

# DeepSpeed's key -> the recipe's: these have one owner, and a file that says otherwise is refused.
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


@dataclass(frozen=True)
class TrainSettings:
    """Optimiser, schedule and sharding. `batch_size` counts rows per worker and micro-step, `effective` rows per step."""

    lr: float
    epochs: int
    batch_size: int
    effective: int
    warmup_frac: float
    weight_decay: float
    max_grad_norm: float
    zero_stage: int
    dtype: str
    seed: int
    schedule: str = "cosine"
    offload_optimizer: bool = False
    offload_params: bool = False
    on_gpu: bool = False


def deepspeed_config(settings: TrainSettings, accumulation: int, extra: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's config for one training; `extra` (see `read_extra`) adds what the recipe has no key for."""
    zero: dict[str, Any] = {"stage": settings.zero_stage, "overlap_comm": settings.on_gpu}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": settings.on_gpu}
    if settings.offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": settings.on_gpu}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": zero,
        # torch's AdamW everywhere: DeepSpeed's own for offloaded states is compiled on first use, for minutes
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if settings.dtype != "float32":
        config["bf16" if settings.dtype == "bfloat16" else "fp16"] = {"enabled": True}
    return _merged(config, extra)


def read_extra(path: str, settings: TrainSettings, accumulation: int, section: str = "dpo") -> dict[str, Any]:
    """A user's DeepSpeed JSON less what the recipe has keys for; empty for no path. section: of the recipe that names it.

    Raises:
        UserError: not a readable JSON object, or it sets what a key of the recipe sets, to another value.
    """
    if not path:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{section}.deepspeed {path}: not a readable JSON file ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{section}.deepspeed {path}: must hold a JSON object, not {type(found).__name__}")
    config = deepspeed_config(settings, accumulation, {})
    for key, owner in OWNED.items():
        table, _, name = key.rpartition(".")
        inside = found.get(table, {}) if table else found
        if not isinstance(inside, dict):
            raise UserError(
                f"{section}.deepspeed {path}: {table} must be an object, not {json.dumps(inside)}"
            )
        theirs, ours = inside.pop(name, None), _at(config, key)
        if theirs is None or theirs == "auto" or theirs == ours or (theirs is False and ours is None):
            continue
        raise UserError(
            f"{section}.deepspeed {path}: {key} = {json.dumps(theirs)} contradicts the recipe ({json.dumps(ours)}); "
            f"leave it out there and set {owner} in the recipe"
        )
    return found


def _at(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in over.items():
        if value == "auto":  # transformers' word for "as the trainer has it"
            continue
        mine = found.get(key)
        found[key] = _merged(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return found
