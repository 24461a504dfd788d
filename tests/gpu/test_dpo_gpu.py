"""Log-probabilities in groups on a GPU: FlexAttention's kernels against the plain path, and QLoRA's first step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dpo4rec_ray.config.training import DPOSection, PolicySection
from dpo4rec_ray.policy.batch import collate
from dpo4rec_ray.policy.groups import Group, apart, collate_groups
from dpo4rec_ray.policy.logps import CompletionLogps
from tests.families import FAMILIES, VOCABULARY, tiny_model

pytestmark = pytest.mark.gpu
SECTION, DPO = PolicySection(lora_rank=4, lora_alpha=8), DPOSection(beta=0.1)


def groups() -> list[Group]:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    return [Group(tokens(70 + 30 * i), [tokens(20 + i), tokens(33 - i)]) for i in range(4)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packing", [False, True])
def test_flex_attention_equals_the_plain_path(family: str, packing: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    plain, shared = tiny_model(family).cuda(), tiny_model(family).cuda()
    alone = apart(groups())
    padded = collate([one.prompt for one in alone], [one.completions[0] for one in alone], 0).to("cuda")
    expected = CompletionLogps(plain)(padded)
    expected.sum().backward()
    laid_out = collate_groups(groups(), 0, packing=packing, multiple_of=128).to("cuda")
    found = CompletionLogps(shared, grouped=True, chunk_tokens=64)(laid_out)
    found.sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    for (name, one), (_, other) in zip(plain.named_parameters(), shared.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        torch.testing.assert_close(other.grad, one.grad, atol=1e-3, rtol=1e-3)


def test_a_4_bit_base_with_a_new_lora_is_its_own_reference(tmp_path: Any) -> None:
    pytest.importorskip("bitsandbytes")
    from dpo4rec_ray.policy.model import add_lora, load_model
    from dpo4rec_ray.policy.objectives import BatchLayout, DPOObjective

    tiny_model("llama").save_pretrained(tmp_path)
    model = CompletionLogps(add_lora(load_model(str(tmp_path), "bfloat16", quantize="4bit"), SECTION))
    rows = [
        {
            "prompt_token_ids": group.prompt,
            "chosen_token_ids": group.completions[0],
            "rejected_token_ids": group.completions[1:],
        }
        for group in groups()
    ]
    objective = DPOObjective(BatchLayout(0), DPO)
    loss, _ = objective(model, objective.collate(rows).to("cuda"))
    assert loss.item() / len(rows) == pytest.approx(math.log(2), abs=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
