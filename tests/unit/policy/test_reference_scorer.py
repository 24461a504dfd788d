"""Stored log-probabilities: of a base, and of a policy whose LoRA was not merged, as a run on GPUs has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dpo4rec_ray.config.training import PolicySection
from dpo4rec_ray.policy.batch import collate
from dpo4rec_ray.policy.groups import Group
from dpo4rec_ray.policy.logps import CompletionLogps
from dpo4rec_ray.policy.model import add_lora, load_model, save_merged
from dpo4rec_ray.policy.reference_scorer import ReferenceScorer

BASE = str(Path(__file__).resolve().parents[3] / "dpo4rec_ray/policy/bundled")
GROUPS = [
    Group([5, 6, 7, 8], [[9, 10, 11], [12, 13]]),
    Group([20, 21], [[22, 23, 24, 25, 26]]),
    Group([5, 30, 31], [[9], [40, 41, 42, 43]]),
]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA that changes the model: a new one changes nothing."""
    torch.manual_seed(0)
    model = add_lora(load_model(BASE, "float32"), PolicySection(lora_rank=4))
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.05)
    folder = tmp_path_factory.mktemp("lora")
    model.save_pretrained(folder)
    return str(folder)


def merged_logps(lora: str, folder: Path, temperature: float) -> list[list[list[float]]]:
    save_merged(BASE, lora, folder / "merged", "float32")
    model = CompletionLogps(
        load_model(str(folder / "merged"), "float32"), per_token=True, temperature=temperature
    )
    with torch.no_grad():
        return [
            [model(collate([group.prompt], [text], 0)).flatten().tolist() for text in group.completions]
            for group in GROUPS
        ]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_policy_that_was_not_merged_has_the_log_probabilities_of_the_merged_one(
    lora: str, tmp_path: Path, packing: bool, temperature: float
) -> None:
    section = PolicySection(prefix_sharing=packing, packing=packing)
    scorer = ReferenceScorer(BASE, "float32", section, per_token=True, temperature=temperature, lora=lora)
    expected = merged_logps(lora, tmp_path, temperature)
    for found, right in zip(scorer(GROUPS), expected, strict=True):
        for one, other in zip(found, right, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    without = ReferenceScorer(BASE, "float32", section, per_token=True, temperature=temperature)(GROUPS)
    assert abs(without[0][0][0] - expected[0][0][0]) > 1e-2, "which is not the base"
    for found, right in zip(scorer(GROUPS, lora=False), without, strict=True):
        for one, other in zip(found, right, strict=True):
            assert one == pytest.approx(other, abs=1e-5), "the same workers give the base's too"
    assert scorer(GROUPS)[0][0] == pytest.approx(expected[0][0], abs=1e-4), "and the LoRA counts again"


def test_one_number_per_text_is_the_sum_over_its_tokens(lora: str) -> None:
    per_token = ReferenceScorer(BASE, "float32", PolicySection(), per_token=True, lora=lora)(GROUPS)
    whole = ReferenceScorer(BASE, "float32", PolicySection(), lora=lora)(GROUPS)
    for texts, sums in zip(per_token, whole, strict=True):
        assert [sum(one) for one in texts] == pytest.approx(sums, abs=1e-4)
