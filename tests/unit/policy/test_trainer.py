"""The trainer under a real DeepSpeed engine, one process on gloo."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from dpo4rec_ray.config.training import DPOSection, PolicySection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.policy.batch import collate
from dpo4rec_ray.policy.logps import CompletionLogps
from dpo4rec_ray.policy.model import add_lora
from dpo4rec_ray.policy.objectives import BatchLayout, DPOObjective, SupervisedObjective
from dpo4rec_ray.policy.trainer import FirstFigure, Trainer, without_dropout
from dpo4rec_ray.train.dpo import FIRST_LOSS_NOISE

pytestmark = pytest.mark.usefixtures("one_process")


RUN = {"dtype": "float32", "seed": 3}
DPO = DPOSection(beta=0.1)


def section(batch_size: int = 8, global_batch_size: int = 8, **changes: Any) -> PolicySection:
    values = {
        "lr": 1e-2, "epochs": 1, "batch_size": batch_size, "num_workers": 1, "warmup_frac": 0.0, "max_grad_norm": 1e9,
        "gradient_accumulation_steps": global_batch_size // batch_size, "zero_stage": 2, "lora_rank": 4,
        "lora_alpha": 8,
    }  # fmt: skip
    return PolicySection(**{**values, **changes})


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
            "rejected_token_ids": [[*tokens(3 + i % 2), 2]],
        }
        for i in range(count)
    ]


def lora_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return add_lora(base_model(), section())


PLAIN = BatchLayout(0)


def fit_dpo(
    rows: list[dict], layout: BatchLayout = PLAIN, **changes: Any
) -> tuple[Trainer, list[dict[str, float]]]:
    metrics: list[dict[str, float]] = []
    model = CompletionLogps(lora_model(), grouped=layout.grouped, chunk_tokens=7)
    own = section(**changes)
    trainer = Trainer(model, rows, DPOObjective(layout, DPO), own, **RUN)
    trainer.run(
        lambda step, total, found: bool(metrics.append(found)),
        expect_first=FirstFigure("loss", math.log(2), 1e-3),
    )
    return trainer, metrics


def lora_weights(model: torch.nn.Module | Trainer) -> torch.Tensor:
    module = model.engine.module if isinstance(model, Trainer) else model
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])


LAYOUTS = [
    PLAIN,
    BatchLayout(0, prefix_sharing=True),
    BatchLayout(0, packing=True),
    BatchLayout(0, prefix_sharing=True, packing=True),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dpo_starts_at_ln2_and_learns_its_pairs(layout: BatchLayout) -> None:
    rows = pairs(8)
    trainer, metrics = fit_dpo(rows, layout, epochs=15)
    # Half of beta (0.1) times what the log-ratios may be off by rounding: kernels sum in another order for other shapes.
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=0.05 * FIRST_LOSS_NOISE["float32"])
    assert metrics[0]["kl_per_token"] == pytest.approx(0.0, abs=1e-6)
    assert metrics[-1]["loss"] < 0.6
    assert metrics[-1]["accuracy"] == 1.0
    assert trainer.evaluate(rows, batch_size=3)["accuracy"] == 1.0


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts_take_the_same_steps(layout: BatchLayout) -> None:
    rows = pairs(12)
    plain, plain_metrics = fit_dpo(rows, epochs=3, batch_size=2)
    other, other_metrics = fit_dpo(rows, layout, epochs=3, batch_size=2)
    for one, another in zip(plain_metrics, other_metrics, strict=True):
        assert one["loss"] == pytest.approx(another["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(another["grad_norm"], rel=1e-4)
    torch.testing.assert_close(lora_weights(plain), lora_weights(other), atol=1e-4, rtol=1e-3)


def test_one_by_eight_equals_eight_by_one() -> None:
    """Accumulating 8 single pairs takes the same steps as one batch of 8, the short last step of an epoch included."""
    rows = pairs(19)
    wide, wide_metrics = fit_dpo(rows, batch_size=8, epochs=2)
    narrow, narrow_metrics = fit_dpo(rows, batch_size=1, epochs=2)
    assert len(wide_metrics) == len(narrow_metrics) == 6
    for one, other in zip(wide_metrics, narrow_metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    torch.testing.assert_close(lora_weights(wide), lora_weights(narrow), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_zero_stages_take_the_same_steps(zero_stage: int) -> None:
    rows = pairs(12)
    second, second_metrics = fit_dpo(rows, epochs=3, batch_size=2, zero_stage=2, max_grad_norm=0.05)
    own, metrics = fit_dpo(rows, epochs=3, batch_size=2, zero_stage=zero_stage, max_grad_norm=0.05)
    for one, other in zip(second_metrics, metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4) and one["grad_norm"] > 0.05
    if zero_stage < 3:  # there the weights are partitioned
        torch.testing.assert_close(lora_weights(second), lora_weights(own), atol=1e-5, rtol=0)


def test_half_precision_without_sharding_takes_the_same_steps() -> None:
    """DeepSpeed's own first step there, without gradients, is no step of Adam's."""
    norms = {}
    for zero_stage in (0, 1):
        model = CompletionLogps(lora_model().to(torch.bfloat16))
        own = section(batch_size=8, epochs=4, zero_stage=zero_stage, schedule="constant")
        trainer = Trainer(model, pairs(8), DPOObjective(PLAIN, DPO), own, dtype="bfloat16", seed=3)
        norms[zero_stage] = []
        trainer.run(lambda step, total, found, one=norms[zero_stage]: bool(one.append(found["grad_norm"])))
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)
    assert min(norms[0]) < 0.7 * max(norms[0])  # steps that can tell


def test_weights_that_are_no_numbers_end_the_training() -> None:
    model = lora_model()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(math.nan)
    trainer = Trainer(CompletionLogps(model), pairs(8), DPOObjective(PLAIN, DPO), section(), **RUN)
    with pytest.raises(UserError, match="step 1: the loss is nan; lower lr"):
        trainer.run(lambda *_: False)


def test_dropout_of_any_kind_is_off() -> None:
    """OPT keeps its share as a number and drops by a function."""
    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(vocab_size=48, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
    ).train()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    assert (model(ids).logits - model(ids).logits).abs().max().item() > 1e-3
    without_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    adapted = add_lora(model, PolicySection(lora_rank=2, lora_alpha=4, lora_dropout=0.25))
    without_dropout(adapted)
    assert {m.p for n, m in adapted.named_modules() if n.endswith("lora_dropout.default")} == {0.25}


def test_a_policy_that_differs_from_its_reference_is_refused() -> None:
    model = lora_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(CompletionLogps(model), pairs(8), DPOObjective(PLAIN, DPO), section(), **RUN)
    with pytest.raises(UserError, match=r"not 0\.693"):
        trainer.run(lambda *_: False, expect_first=FirstFigure("loss", math.log(2), 1e-3))


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_saved_state_continues_to_the_same_weights(tmp_path: Path, zero_stage: int) -> None:
    rows = pairs(12)
    whole, metrics = fit_dpo(rows, epochs=4, batch_size=2, zero_stage=zero_stage)
    first = Trainer(
        CompletionLogps(lora_model()),
        rows,
        DPOObjective(PLAIN, DPO),
        section(epochs=4, batch_size=2, zero_stage=zero_stage),
        **RUN,
    )
    first.run(lambda step, *_: step == 3)
    first.save(tmp_path)
    again: list[dict[str, float]] = []
    second = Trainer(
        CompletionLogps(lora_model()),
        rows,
        DPOObjective(PLAIN, DPO),
        section(epochs=4, batch_size=2, zero_stage=zero_stage),
        **RUN,
    )
    second.load(tmp_path)
    assert second.step == 3
    second.run(lambda step, total, found: bool(again.append(found)))
    assert [one["loss"] for one in again] == [one["loss"] for one in metrics[3:]]
    assert torch.equal(lora_weights(second), lora_weights(whole))


def test_first_steps_equal_a_plain_pytorch_loop() -> None:
    """Losses and weights of 4 steps against AdamW written out here, with a deep copy of the model as reference."""
    rows = pairs(8)
    engine_model, metrics = fit_dpo(rows, batch_size=8, epochs=4)
    model = lora_model()
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    losses = []
    prompts = [row["prompt_token_ids"] for row in rows]
    sides = ([row["chosen_token_ids"] for row in rows], [row["rejected_token_ids"][0] for row in rows])
    for step in range(4):
        for group in optimizer.param_groups:  # no warm-up, cosine to 0
            group["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / 4))
        policy = [CompletionLogps(model)(collate(prompts, side, 0)) for side in sides]
        with torch.no_grad():
            frozen = [CompletionLogps(reference)(collate(prompts, side, 0)) for side in sides]
        margin = (policy[0] - frozen[0]) - (policy[1] - frozen[1])
        loss = -torch.nn.functional.logsigmoid(0.1 * margin).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [found["loss"] for found in metrics] == pytest.approx(losses, rel=1e-4)
    rates = [1e-2 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert [found["lr"] for found in metrics] == pytest.approx(rates), "each step's own"
    torch.testing.assert_close(lora_weights(engine_model), lora_weights(model), atol=1e-4, rtol=1e-3)


def test_nothing_is_compiled_and_no_shared_memory_is_left() -> None:
    Trainer(CompletionLogps(lora_model()), pairs(8), DPOObjective(PLAIN, DPO), section(), **RUN)
    from deepspeed import comm

    assert comm.comm.cdb is not None and comm.comm.cdb.shm_comm_op is None
    assert "deepspeed_allreduce" not in Path("/proc/self/maps").read_text()


def test_supervised_learns_its_rows() -> None:
    rows = [
        {"prompt_token_ids": p["prompt_token_ids"], "completion_token_ids": p["chosen_token_ids"]}
        for p in pairs(8)
    ]
    metrics: list[dict[str, float]] = []
    trainer = Trainer(
        CompletionLogps(base_model()), rows, SupervisedObjective(PLAIN), section(epochs=30), **RUN
    )
    trainer.run(lambda step, total, found: bool(metrics.append(found)))
    assert len(metrics) == 30
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]


def test_fewer_rows_than_an_accumulation_still_make_a_step() -> None:
    _, metrics = fit_dpo(pairs(3), batch_size=2, global_batch_size=128)
    assert len(metrics) == 1


def test_a_new_key_of_the_recipe_reaches_trainer_and_objective() -> None:
    class Wider(PolicySection):
        new_key: int = 7

    class WiderDPO(DPOSection):
        new_key: int = 8

    objective = DPOObjective(PLAIN, WiderDPO())
    trainer = Trainer(CompletionLogps(lora_model()), pairs(8), objective, Wider(), **RUN)
    assert (trainer._section.new_key, objective._section.new_key) == (7, 8)  # type: ignore[attr-defined]
