from __future__ import annotations

import numpy as np
import pytest
import torch

from dpo4rec_ray.config.ranking import RerankerArchitecture
from dpo4rec_ray.rerankers.adapter import ADAPTERS, HybridExpertAdapter, KnowledgeAdapter

# Per adapter, for a side: its experts in order, and its gate. None: one expert, no gate.
STRUCTURE = {
    "hea": lambda side: (["shared", f"{side}_experts"], f"{side}_gate"),
    "moe": lambda side: (["experts"], "gate"),
    "mlp": lambda side: (["layers"], None),
}


def by_hand(adapter: KnowledgeAdapter, groups: list[str], gate: str | None, vector: np.ndarray) -> np.ndarray:
    """One vector, one expert at a time."""
    weights = {name: tensor.detach().double().numpy() for name, tensor in adapter.state_dict().items()}
    outputs = []
    for group in groups:
        for expert in range(len(weights[f"{group}.weight_in"])):
            hidden = weights[f"{group}.weight_in"][expert] @ vector + weights[f"{group}.bias_in"][expert]
            out = (
                weights[f"{group}.weight_out"][expert] @ np.maximum(hidden, 0)
                + weights[f"{group}.bias_out"][expert]
            )
            outputs.append(np.maximum(out, 0))
    if gate is None:
        return outputs[0]
    shares = np.exp(weights[f"{gate}.weight"] @ vector + weights[f"{gate}.bias"])
    shares /= shares.sum()
    return sum(share * output for share, output in zip(shares, outputs, strict=True))


def build(name: str, vector_dim: int = 6) -> KnowledgeAdapter:
    torch.manual_seed(0)
    sizes = RerankerArchitecture(
        adapter_dim=4, num_shared_experts=2, num_dedicated_experts=3, expert_hidden_dim=8
    )
    adapter = ADAPTERS[name](vector_dim, sizes)
    for parameter in adapter.parameters():  # biases too, or the tests would not see them
        torch.nn.init.normal_(parameter)
    return adapter


@pytest.mark.parametrize("side", ["user", "item"])
@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_equals_experts_one_by_one(name, side):
    adapter, vectors = build(name), torch.randn(5, 6)
    found = getattr(adapter, f"{side}_side")(vectors)
    groups, gate = STRUCTURE[name](side)
    expected = np.stack([by_hand(adapter, groups, gate, vector) for vector in vectors.double().numpy()])
    assert found.shape == (5, 4)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_sizes_are_comparable(name):
    """Then only the structures of the adapters are compared."""
    sizes = {
        key: sum(parameter.numel() for parameter in ADAPTERS[key](384, RerankerArchitecture()).parameters())
        for key in ("hea", name)
    }
    assert sizes[name] == pytest.approx(sizes["hea"], rel=0.02)


@pytest.mark.parametrize("name", ["moe", "mlp"])
def test_one_network_for_both_sides(name):
    adapter, vectors = build(name), torch.randn(3, 6)
    assert torch.equal(adapter.user_side(vectors), adapter.item_side(vectors))


def test_sides_share_the_shared_experts_only():
    adapter = HybridExpertAdapter(6, RerankerArchitecture())
    user = torch.autograd.grad(
        adapter.user_side(torch.ones(1, 6)).sum(), list(adapter.parameters()), allow_unused=True
    )
    used = {
        name for (name, _), grad in zip(adapter.named_parameters(), user, strict=True) if grad is not None
    }
    assert {name.split(".")[0] for name in used} == {"shared", "user_experts", "user_gate"}


def test_defaults_are_kars():
    adapter = ADAPTERS["hea"](384, RerankerArchitecture())
    assert adapter.shared.weight_in.shape == (2, 128, 384)
    assert adapter.item_experts.weight_out.shape == (5, 32, 128)
    # Xavier-normal per expert: std = sqrt(2 / (fan_in + fan_out)).
    assert adapter.user_experts.weight_in.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
