from __future__ import annotations

import numpy as np
import pytest
import torch

from dpo4rec_ray.rerankers.adapter import ADAPTERS, HybridExpertAdapter


def by_hand(adapter: HybridExpertAdapter, side: str, vector: np.ndarray) -> np.ndarray:
    """One vector, one expert at a time."""
    weights = {name: tensor.detach().double().numpy() for name, tensor in adapter.state_dict().items()}
    outputs = []
    for group in ("shared", f"{side}_experts"):
        for expert in range(len(weights[f"{group}.weight_in"])):
            hidden = weights[f"{group}.weight_in"][expert] @ vector + weights[f"{group}.bias_in"][expert]
            out = (
                weights[f"{group}.weight_out"][expert] @ np.maximum(hidden, 0)
                + weights[f"{group}.bias_out"][expert]
            )
            outputs.append(np.maximum(out, 0))
    gate = np.exp(weights[f"{side}_gate.weight"] @ vector + weights[f"{side}_gate.bias"])
    gate /= gate.sum()
    return sum(share * output for share, output in zip(gate, outputs, strict=True))


@pytest.mark.parametrize("side", ["user", "item"])
def test_hea_equals_experts_one_by_one(side):
    torch.manual_seed(0)
    adapter = HybridExpertAdapter(6, 4, num_shared=2, num_dedicated=3, hidden_dim=8)
    for parameter in adapter.parameters():  # biases too, or the test would not see them
        torch.nn.init.normal_(parameter)
    vectors = torch.randn(5, 6)
    found = getattr(adapter, f"{side}_side")(vectors)
    expected = np.stack([by_hand(adapter, side, vector) for vector in vectors.double().numpy()])
    assert found.shape == (5, 4)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_sides_share_the_shared_experts_only():
    adapter = HybridExpertAdapter(6)
    user = torch.autograd.grad(
        adapter.user_side(torch.ones(1, 6)).sum(), list(adapter.parameters()), allow_unused=True
    )
    used = {
        name for (name, _), grad in zip(adapter.named_parameters(), user, strict=True) if grad is not None
    }
    assert {name.split(".")[0] for name in used} == {"shared", "user_experts", "user_gate"}


def test_defaults_are_kars():
    adapter = ADAPTERS["hea"](384)
    assert adapter.shared.weight_in.shape == (2, 128, 384)
    assert adapter.item_experts.weight_out.shape == (5, 32, 128)
    # Xavier-normal per expert: std = sqrt(2 / (fan_in + fan_out)).
    assert adapter.user_experts.weight_in.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
