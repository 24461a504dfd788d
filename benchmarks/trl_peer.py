"""What the measured trainings with TRL share: its trainer's arguments, our LoRA to start from, and a clock."""

from __future__ import annotations

import time
from typing import Any

import torch
from dpo_training import LORA
from peft import LoraConfig, TaskType
from transformers import TrainerCallback

from dpo4rec_ray.config.training import PolicySection
from dpo4rec_ray.policy.model import add_lora, load_model


class Clock(TrainerCallback):
    """The time at the beginning and after each step, and the gradients' norms."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.norms: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(time.monotonic())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.monotonic())

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **__: Any) -> None:
        if "grad_norm" in logs:
            self.norms.append(logs["grad_norm"])


def lora_config() -> LoraConfig:
    return LoraConfig(
        r=LORA["lora_rank"],
        lora_alpha=LORA["lora_alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type=TaskType.CAUSAL_LM,
    )


def arguments(spec: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Of TRL's configs: as our trainer is set, and nothing written or reported."""
    return {
        "output_dir": f"{spec['folder']}/trl",
        "gradient_accumulation_steps": spec["gradient_accumulation_steps"],
        "max_steps": spec["steps"],
        "learning_rate": spec["lr"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": dtype},
    }


def start_as_ours(model: Any, folder: str, dtype: str) -> None:
    """Give a model with a LoRA the first weights of ours."""
    plain = load_model(folder, dtype)
    torch.manual_seed(0)
    ours = add_lora(plain, PolicySection(**LORA)).state_dict()
    same = {name: value for name, value in ours.items() if "lora_" in name}
    missing = model.load_state_dict(same, strict=False).unexpected_keys
    assert not missing, missing


def sums_of(values: list[float], count: int) -> list[float]:
    """Of every `count` values: the losses of a step's micro-steps."""
    return [sum(values[start : start + count]) for start in range(0, len(values), count)]
