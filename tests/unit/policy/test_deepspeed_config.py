"""The recipe's keys as DeepSpeed's, and a user's JSON over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from dpo4rec_ray.config.training import TrainerSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.deepspeed_config import OWNED, deepspeed_config, read_extra

DTYPE = "bfloat16"


def section(file: Path | None = None, **changes: Any) -> TrainerSection:
    values = {
        "batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_workers": 1,
        "max_grad_norm": 0.5,
        "zero_stage": 3,
    }
    return TrainerSection(**{**values, "deepspeed": str(file or ""), **changes})


def test_deepspeed_reads_what_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    made = deepspeed_config(section(offload_optimizer=True, offload_params=True), DTYPE, 4, {})
    found = DeepSpeedConfig(made)
    assert found.train_micro_batch_size_per_gpu == 2
    assert found.gradient_accumulation_steps == 4
    assert found.gradient_clipping == 0.5
    assert found.zero_config.stage == 3
    assert found.zero_config.offload_optimizer.device == found.zero_config.offload_param.device == "cpu"
    assert found.bfloat16_config.enabled


def test_a_file_adds_what_the_recipe_has_no_key_for(tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(
        json.dumps(
            {
                "zero_optimization": {"stage": 3, "reduce_bucket_size": 12345},
                "gradient_clipping": "auto",
                "train_micro_batch_size_per_gpu": 2,
                "fp16": {"enabled": False},
                "wall_clock_breakdown": True,
            }
        )
    )
    made = deepspeed_config(section(), DTYPE, 4, read_extra(section(file), DTYPE))
    assert made["zero_optimization"] == {"stage": 3, "overlap_comm": False, "reduce_bucket_size": 12345}
    assert made["gradient_clipping"] == 0.5 and made["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    "extra",
    [
        {"zero_optimization": {"stage": 2}},
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        {"train_batch_size": 64},
        {"train_micro_batch_size_per_gpu": 1},
        {"gradient_clipping": 1.0},
        {"optimizer": {"type": "Adam"}},
        {"scheduler": {"type": "WarmupLR"}},
        {"fp16": {"enabled": True}},
        {"bf16": {"enabled": False}},
    ],
)
def test_a_contradiction_is_refused_and_names_the_recipes_key(extra: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(extra))
    with pytest.raises(UserError) as refused:
        read_extra(section(tmp_path / "own.json"), DTYPE)
    (key,) = [key for key in OWNED if key.split(".")[0] in extra and key in str(refused.value)]
    assert OWNED[key] in str(refused.value)


@pytest.mark.parametrize("content", ["{", "[1]", '{"zero_optimization": 3}'])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(UserError, match=r"bad\.json"):
        read_extra(section(tmp_path / "bad.json"), DTYPE)
    with pytest.raises(UserError, match=r"missing\.json"):
        read_extra(section(tmp_path / "missing.json"), DTYPE)


def test_a_file_that_agrees_does_not_bind_the_trainer(tmp_path: Path) -> None:
    """Fewer workers, or fewer rows than a step holds, change how many micro-batches make a step."""
    (tmp_path / "own.json").write_text('{"gradient_accumulation_steps": 4, "steps_per_print": 7}')
    extra = read_extra(section(tmp_path / "own.json"), DTYPE)
    made = deepspeed_config(section(), DTYPE, 8, extra)
    assert (made["gradient_accumulation_steps"], made["steps_per_print"]) == (8, 7)
