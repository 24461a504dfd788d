"""Every family through DPO, LoRA and full, prefix sharing on and off: same losses, and what is saved reloads to equal logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from dpo4rec_ray.config.training import DPOSection, PolicySection
from dpo4rec_ray.policy.logps import CompletionLogps, bare
from dpo4rec_ray.policy.model import add_lora, gathered_state, load_model
from dpo4rec_ray.policy.objectives import BatchLayout, DPOObjective
from dpo4rec_ray.policy.trainer import Trainer
from tests.families import FAMILIES, VOCABULARY, tiny_model

pytestmark = pytest.mark.usefixtures("one_process")

SECTION = PolicySection(
    lr=1e-2,
    schedule="constant",
    epochs=2,
    batch_size=2,
    gradient_accumulation_steps=2,
    num_workers=1,
    warmup_frac=0.0,
    max_grad_norm=1.0,
    zero_stage=0,
    lora_rank=4,
    lora_alpha=8,
)
DPO = DPOSection(beta=0.1, loss="softmax")


def rows(model: Any) -> list[dict[str, Any]]:
    """Pairs with one or two rejected texts, and the model's own log-probabilities as the reference."""
    rng = np.random.default_rng(0)

    def tokens(low: int, high: int) -> list[int]:
        return rng.integers(3, VOCABULARY, rng.integers(low, high)).tolist()

    found = [
        {
            "prompt_token_ids": [1, *tokens(9, 14)],
            "chosen_token_ids": [*tokens(3, 7), 2],
            "rejected_token_ids": [[*tokens(3, 7), 2] for _ in range(1 + i % 2)],
        }
        for i in range(8)
    ]
    batch = DPOObjective(BatchLayout(0), DPO).collate(found)
    with torch.no_grad():
        logps = CompletionLogps(model)(batch.tokens).tolist()
    for row, count in zip(found, batch.counts, strict=True):
        row["chosen_logp"], *row["rejected_logp"] = logps[:count]
        logps = logps[count:]
    return found


def logits(model: Any) -> torch.Tensor:
    """By the model's own attention."""
    bare(model).set_attn_implementation("eager")
    token_ids = torch.arange(1, 17)[None]
    with torch.no_grad():
        return model.eval()(input_ids=token_ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_trains_alike_with_and_without_sharing_and_reloads(family: str, tuning: str, tmp_path: Path) -> None:
    base = tiny_model(family)
    base.save_pretrained(tmp_path / "base")
    pairs = rows(tiny_model(family))
    losses, saved = [], []
    for shared in (False, True):
        torch.manual_seed(0)
        model: Any = tiny_model(family)
        before = logits(tiny_model(family))
        if tuning == "lora":
            model = add_lora(model, SECTION)
        layout = BatchLayout(0, prefix_sharing=shared, packing=shared)
        trainer = Trainer(
            CompletionLogps(model, grouped=shared, chunk_tokens=5 if shared else 0),
            pairs,
            DPOObjective(layout, DPO),
            SECTION,
            dtype="float32",
            seed=0,
        )
        metrics: list[dict[str, float]] = []
        trainer.run(lambda step, total, found, metrics=metrics: bool(metrics.append(found)))
        losses.append([one["loss"] for one in metrics])
        target = tmp_path / f"policy-{shared}"
        state = gathered_state(model, 0, trained_only=tuning == "lora")
        model.save_pretrained(target, state_dict=state)
        if tuning == "lora":
            reloaded: Any = PeftModel.from_pretrained(
                load_model(str(tmp_path / "base"), "float32"), str(target)
            )
        else:
            reloaded = load_model(str(target), "float32")
        saved.append(logits(reloaded))
        torch.testing.assert_close(saved[-1], logits(model), atol=1e-6, rtol=0)
        assert (saved[-1] - before).abs().max() > 1e-3
    first = next(trainer.order.steps(2, 0, 1)).rows
    # policy equals reference: ln 2 with one rejected text, ln 3 with two
    expected = sum(math.log(1 + len(pairs[i]["rejected_token_ids"])) for i in first) / len(first)
    assert losses[0][0] == pytest.approx(expected, abs=1e-5)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
