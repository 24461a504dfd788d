"""The trainer under a real DeepSpeed engine, one process on gloo."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from dpo4rec_ray.core.losses import dpo_loss
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.batch import collate_pairs, completion_logps
from dpo4rec_ray.policy.model import add_lora
from dpo4rec_ray.policy.trainer import DPOObjective, SupervisedObjective, TrainSettings, evaluate_pairs, train


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE="1", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def settings(**changes: object) -> TrainSettings:
    values = {
        "lr": 1e-2, "epochs": 1, "batch_size": 8, "accumulation": 1, "warmup_frac": 0.0, "weight_decay": 0.0,
        "max_grad_norm": 1e9, "zero_stage": 2, "dtype": "float32", "seed": 3,
    }  # fmt: skip
    return TrainSettings(**{**values, **changes})  # type: ignore[arg-type]


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.2,
        )
    )


def pairs(count: int) -> list[dict]:
    rng = np.random.default_rng(1)

    def tokens(length: int) -> list[int]:
        return rng.integers(3, 48, length).tolist()

    return [
        {
            "prompt_token_ids": [1, *tokens(6 + i % 3)],
            "chosen_token_ids": [*tokens(4), 2],
            "rejected_token_ids": [*tokens(3 + i % 2), 2],
        }
        for i in range(count)
    ]


def fit_dpo(rows: list[dict], **changes: object) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    torch.manual_seed(0)
    model = add_lora(base_model(), rank=4, alpha=8)
    figures: list[dict[str, float]] = []
    train(
        model,
        rows,
        DPOObjective(pad_id=0, beta=0.1),
        settings(**changes),
        on_step=lambda step, total, found: figures.append(found),
        expect_first_loss=math.log(2),
    )
    return model, figures


def lora_weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def test_dpo_starts_at_ln2_and_learns_its_pairs() -> None:
    rows = pairs(8)
    model, figures = fit_dpo(rows, epochs=15)
    assert figures[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert figures[0]["kl_per_token"] == pytest.approx(0.0, abs=1e-6)
    assert figures[-1]["loss"] < 0.6
    assert figures[-1]["accuracy"] == 1.0
    heldout = evaluate_pairs(model, rows, DPOObjective(0, 0.1), batch_size=3)
    assert heldout["accuracy"] == 1.0


def test_one_by_eight_equals_eight_by_one() -> None:
    """Accumulating 8 single pairs takes the same steps as one batch of 8."""
    rows = pairs(16)
    wide, wide_figures = fit_dpo(rows, batch_size=8, accumulation=1, epochs=2)
    narrow, narrow_figures = fit_dpo(rows, batch_size=1, accumulation=8, epochs=2)
    assert len(wide_figures) == len(narrow_figures) == 4
    for one, other in zip(wide_figures, narrow_figures, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    torch.testing.assert_close(lora_weights(wide), lora_weights(narrow), atol=1e-4, rtol=1e-3)


def test_a_policy_that_differs_from_its_reference_is_refused() -> None:
    model = add_lora(base_model(), rank=4, alpha=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    with pytest.raises(UserError, match="not ln 2"):
        train(
            model,
            pairs(8),
            DPOObjective(0, 0.1),
            settings(),
            on_step=lambda *_: None,
            expect_first_loss=math.log(2),
        )


def test_first_steps_equal_a_plain_pytorch_loop() -> None:
    """Losses and weights of 4 steps against AdamW written out here, with a deep copy of the model as reference."""
    rows = pairs(8)
    engine_model, figures = fit_dpo(rows, batch_size=8, epochs=4)
    torch.manual_seed(0)
    model = add_lora(base_model(), rank=4, alpha=8)
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    losses = []
    for step in range(4):
        for group in optimizer.param_groups:  # warm-up of one step, then cosine to 5 %
            group["lr"] = 1e-2 * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * max(step - 1, 0) / 3)))
        batch = collate_pairs(
            *([row[f"{n}_token_ids"] for row in rows] for n in ("prompt", "chosen", "rejected")), 0
        )
        policy = completion_logps(model, batch)
        with torch.no_grad():
            frozen = completion_logps(reference, batch)
        loss = dpo_loss(policy[:8], policy[8:], frozen[:8], frozen[8:], 0.1)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [found["loss"] for found in figures] == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(lora_weights(engine_model), lora_weights(model), atol=1e-4, rtol=1e-3)


def test_supervised_learns_its_rows() -> None:
    rows = [
        {"prompt_token_ids": p["prompt_token_ids"], "completion_token_ids": p["chosen_token_ids"]}
        for p in pairs(8)
    ]
    figures: list[dict[str, float]] = []
    train(
        base_model(),
        rows,
        SupervisedObjective(0),
        settings(epochs=30),
        on_step=lambda step, total, found: figures.append(found),
    )
    assert len(figures) == 30
    assert figures[-1]["loss"] < 0.5 * figures[0]["loss"]


def test_fewer_rows_than_an_accumulation_still_make_a_step(tmp_path: Path) -> None:
    _, figures = fit_dpo(pairs(3), batch_size=2, accumulation=64)
    assert len(figures) == 1
