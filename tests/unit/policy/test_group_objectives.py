"""Best-of-N and GRPO over groups: every layout of the tokens gives the same loss, and the values are those of plain sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpo4rec_ray.config.training import GRPOSection, PolicySection
from dpo4rec_ray.core.policy_gradient import clipped_surrogate, divergence
from dpo4rec_ray.policy.batch import collate
from dpo4rec_ray.policy.logps import CompletionLogps
from dpo4rec_ray.policy.model import add_lora
from dpo4rec_ray.policy.objectives import BatchLayout, GRPOObjective, SupervisedObjective
from tests.families import tiny_model

LAYOUTS = [
    BatchLayout(0),
    BatchLayout(0, packing=True),
    BatchLayout(0, prefix_sharing=True),
    BatchLayout(0, prefix_sharing=True, packing=True),
]
TEMPERATURE = 0.7


def row(prompt: list[int], completions: list[list[int]], **more: Any) -> dict[str, Any]:
    return {"prompt_token_ids": prompt, "completions": completions, **more}


def token_logps(model: Any, one: dict[str, Any], temperature: float) -> list[torch.Tensor]:
    """Of each completion alone, by the plain path."""
    logps = CompletionLogps(model, per_token=True, temperature=temperature)
    with torch.no_grad():
        return [logps(collate([one["prompt_token_ids"]], [text], 0)) for text in one["completions"]]


def adapted(moved: bool) -> Any:
    """A small Llama with a LoRA, which is at its start or not."""
    torch.manual_seed(0)
    model = add_lora(tiny_model("llama"), PolicySection(lora_rank=4, lora_alpha=8))
    if moved:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


ROWS = [
    row([3, 4, 5], [[6, 7, 2], [8, 2]], weights=[0.7, 0.3], advantages=[1.0, -1.0]),
    row(
        [9, 10], [[11, 12, 13, 2], [14, 2], [15, 16, 2]], weights=[0.2, 0.3, 0.5], advantages=[0.5, -1.5, 1.0]
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_best_texts_weigh_as_they_should(layout: BatchLayout) -> None:
    model = adapted(moved=True)
    expected = sum(
        weight * -logps.double().mean()
        for one in ROWS
        for weight, logps in zip(one["weights"], token_logps(model, one, 1.0), strict=True)
    )
    objective = SupervisedObjective(layout)
    found, metrics = objective(CompletionLogps(model, grouped=layout.grouped), objective.collate(ROWS))
    assert found.item() == pytest.approx(float(expected), abs=1e-5)
    assert metrics["loss"] == metrics["surprise"] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "lora_off"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_grpo_is_the_sum_over_groups(layout: BatchLayout, stored: bool) -> None:
    """Means over each text's tokens, then over the group's texts, by hand from the plain log-probabilities."""
    model, section = adapted(moved=True), GRPOSection(kl_weight=0.1)
    rows, expected = [], 0.0
    for one in ROWS:
        with model.disable_adapter():
            old = token_logps(model, one, TEMPERATURE)
        new = token_logps(model, one, TEMPERATURE)
        for before, after, advantage in zip(old, new, one["advantages"], strict=True):
            loss, _ = clipped_surrogate(after - before, torch.tensor(advantage), 0.2, 0.2)
            both = loss + 0.1 * divergence(after - before, before - after)
            expected += float(both.mean()) / len(old)
        rows.append({**one, "sampler_logps": [logps.tolist() for logps in old]} if stored else one)
    objective = GRPOObjective(layout, section, 10)
    logps = CompletionLogps(
        model, grouped=layout.grouped, chunk_tokens=3, per_token=True, temperature=TEMPERATURE
    )
    found, metrics = objective(logps, objective.collate(rows))
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert metrics["kl_per_token"] > 0 and abs(metrics["ratio"] / len(rows) - 1) > 1e-3


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_grpo_is_pulled_to_the_model_without_its_lora(kl_weight: float) -> None:
    """A later turn: the texts' sampler is stored, the reference is the LoRA's base. Without a pull it is not looked at."""
    model, section = adapted(moved=True), GRPOSection(kl_weight=kl_weight)
    rows, expected = [], 0.0
    for one in ROWS:
        with model.disable_adapter():
            base = token_logps(model, one, TEMPERATURE)
        new = token_logps(model, one, TEMPERATURE)
        drew = [logps - 0.1 for logps in new]
        for before, after, reference, advantage in zip(drew, new, base, one["advantages"], strict=True):
            loss, _ = clipped_surrogate(after - before, torch.tensor(advantage), 0.2, 0.2)
            both = loss + kl_weight * divergence(after - before, reference - after)
            expected += float(both.mean()) / len(drew)
        rows.append({**one, "sampler_logps": [logps.tolist() for logps in drew]})
    objective = GRPOObjective(LAYOUTS[0], section, 10, same_reference=False)
    logps = CompletionLogps(
        model, grouped=LAYOUTS[0].grouped, chunk_tokens=3, per_token=True, temperature=TEMPERATURE
    )
    found, metrics = objective(logps, objective.collate(rows))
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert ("kl_per_token" in metrics) == (kl_weight > 0) and metrics["off_policy"] > 0
