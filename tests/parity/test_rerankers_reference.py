"""Backbones and the hybrid-expert adapter against the papers' equations, one list and one place at a time.

The references are plain numpy loops over the real candidates of a list: no batches, no padding, no masks, and of the
module only its weights, which are drawn at random (biases too, or a forgotten one would not show).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dpo4rec_ray.config.ranking import RerankerArchitecture
from dpo4rec_ray.rerankers import CatalogueShape, Reranker, build_reranker
from dpo4rec_ray.rerankers.adapter import HybridExpertAdapter
from dpo4rec_ray.rerankers.base import ListHistory

Array = np.ndarray
DIM, HEADS = 8, 2
LENGTHS = [1, 7, 4]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    shares = np.exp(x - x.max())
    return shares / shares.sum()


class Weights:
    """The weights of a module by name, in float64."""

    def __init__(self, module: nn.Module) -> None:
        self.values = {name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()}

    def __getitem__(self, name: str) -> Array:
        return self.values[name]

    def linear(self, name: str, x: Array) -> Array:
        bias = self.values.get(f"{name}.bias", 0.0)
        return self[f"{name}.weight"] @ x + bias

    def layer_norm(self, name: str, x: Array) -> Array:
        return self[f"{name}.weight"] * (x - x.mean()) / np.sqrt(x.var() + 1e-5) + self[f"{name}.bias"]

    def batch_norm(self, name: str, x: Array) -> Array:
        """A trained one: by what it has seen in training (Ioffe and Szegedy, 2015)."""
        seen = (x - self[f"{name}.running_mean"]) / np.sqrt(self[f"{name}.running_var"] + 1e-5)
        return self[f"{name}.weight"] * seen + self[f"{name}.bias"]

    def head(self, x: Array) -> float:
        """MLP 200-80-1 with ReLU."""
        hidden = np.maximum(self.linear("head.0", x), 0)
        return float(self.linear("head.4", np.maximum(self.linear("head.2", hidden), 0))[0])

    def gru(self, name: str, sequence: list[Array]) -> list[Array]:
        """Cho et al. (2014), with torch's placing of the reset gate: the state after each step."""
        state, states = np.zeros(DIM), []
        for x in sequence:
            from_input = self[f"{name}.weight_ih_l0"] @ x + self[f"{name}.bias_ih_l0"]
            from_state = self[f"{name}.weight_hh_l0"] @ state + self[f"{name}.bias_hh_l0"]
            reset = sigmoid(from_input[:DIM] + from_state[:DIM])
            update = sigmoid(from_input[DIM : 2 * DIM] + from_state[DIM : 2 * DIM])
            candidate = np.tanh(from_input[2 * DIM :] + reset * from_state[2 * DIM :])
            state = (1 - update) * candidate + update * state
            states.append(state)
        return states

    def attention(self, name: str, sequence: list[Array]) -> list[Array]:
        """Multi-head self-attention (Vaswani et al., 2017, section 3.2) with output projection."""
        width = DIM // HEADS
        projected = [self.linear(f"{name}qkv", x).reshape(3, HEADS, width) for x in sequence]
        results = []
        for query, _, _ in projected:
            heads = []
            for head in range(HEADS):
                logits = [key[head] @ query[head] / np.sqrt(width) for _, key, _ in projected]
                shares = softmax(np.array(logits))
                heads.append(sum(s * value[head] for s, (_, _, value) in zip(shares, projected, strict=True)))
            results.append(self.linear(f"{name}out", np.concatenate(heads)))
        return results

    def block(self, name: str, sequence: list[Array]) -> list[Array]:
        """SetRank's MSAB = PRM's encoder: B = norm(X + MultiHead(X)); norm(B + FFN(B))."""
        results = []
        for x, attended in zip(sequence, self.attention(name, sequence), strict=True):
            b = self.layer_norm(f"{name}norm_attention", x + attended)
            hidden = np.maximum(self.linear(f"{name}expand", b), 0)
            results.append(
                self.layer_norm(f"{name}norm_feed_forward", b + self.linear(f"{name}shrink", hidden))
            )
        return results


def dlcm(w: Weights, candidates: list[Array]) -> list[float]:
    """Ai et al. (2018), local ranking function: phi(o_i, s_n) = V . (o_i * tanh(W s_n + b))."""
    states = w.gru("gru", [w.layer_norm("norm", x) for x in candidates])
    context = np.tanh(w.linear("context", states[-1]))
    return [float(w.linear("weights", state * context)[0]) for state in states]


def dlcm_of_kar(w: Weights, candidates: list[Array]) -> list[float]:
    """The same function of the bare features, of batch-normalised states."""
    states = w.gru("gru", candidates)
    context = np.tanh(w.linear("context", w.batch_norm("norm_last", states[-1])))
    return [float(w.linear("weights", w.batch_norm("norm_states", state) * context)[0]) for state in states]


def prm(w: Weights, candidates: list[Array]) -> list[float]:
    """Pei et al. (2019): positions, encoder layers, a score per place."""
    sequence = []
    for place, x in enumerate(candidates):
        angles = [place / 10000 ** (2 * (column // 2) / DIM) for column in range(DIM)]
        position = [np.cos(a) if column % 2 else np.sin(a) for column, a in enumerate(angles)]
        sequence.append(x * np.sqrt(DIM) + np.array(position))
    for layer in range(2):
        sequence = w.block(f"layers.{layer}.", sequence)
    return [w.head(x) for x in sequence]


def setrank(w: Weights, candidates: list[Array]) -> list[float]:
    """Pang et al. (2020): stacked MSAB, then a row-wise feed-forward score; no positions."""
    sequence = [x * np.sqrt(DIM) for x in candidates]
    for layer in range(2):
        sequence = w.block(f"layers.{layer}.", sequence)
    return [w.head(x) for x in sequence]


def mir(w: Weights, candidates: list[Array], history: list[tuple[Array, int]]) -> list[float]:
    """Xi et al. (2022) as rerankers/mir.py states it: within the set, within the list, set to list, MLP."""
    e = [w.layer_norm("norm_set", x) for x in candidates]
    v = [np.concatenate(pair) for pair in zip(e, w.attention("within_set.", e), strict=True)]
    x = [w.layer_norm("norm_list", item + w["rating_embedding.weight"][stars]) for item, stars in history]
    q = [np.concatenate(pair) for pair in zip(x, w.gru("within_list", x), strict=True)]
    width = 2 * DIM
    affinity = [[w.linear("set_to_list.affinity", vl) @ qh / np.sqrt(width) for qh in q] for vl in v]
    to_list, scores = [], []
    for row in affinity:
        logits = [c + w.linear("set_to_list.list_weight", qh)[0] for c, qh in zip(row, q, strict=True)]
        to_list.append(softmax(np.array(logits)) if q else np.zeros(0))
    mean = np.mean(q, axis=0) if q else np.zeros(width)
    for el, shares in zip(e, to_list, strict=True):
        logits = [
            sum(share * c for share, c in zip(shares, affinity[other], strict=True))
            + w.linear("set_to_list.set_weight", v[other])[0]
            for other in range(len(v))
        ]
        of_set = sum(share * other for share, other in zip(softmax(np.array(logits)), v, strict=True))
        of_list = sum((share * qh for share, qh in zip(shares, q, strict=True)), np.zeros(width))
        scores.append(w.head(np.concatenate([of_set, of_list, el, mean])))
    return scores


def model_of(name: str, input_layer: str = "linear") -> Reranker:
    """Item id and one facet, DIM wide together; weights, and what a norm has seen, drawn at random."""
    architecture = RerankerArchitecture(
        backbone=name,
        embed_dim=DIM // 2,
        hidden_dim=DIM,
        num_heads=HEADS,
        num_layers=2,
        input_layer=input_layer,
    )
    model = build_reranker(architecture, CatalogueShape(5, (3,), 0, ""), False).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    for name, buffer in model.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.2, 2.0)
    return model


def lists() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [3, 7, DIM] and mask of three lists; the numbers at padding are large, so that a model that reads them fails."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    inputs = torch.randn(*mask.shape, DIM, generator=generator)
    return inputs.where(mask.unsqueeze(-1), torch.tensor(100.0)), mask


def candidates_of(inputs: torch.Tensor, row: int) -> list[Array]:
    return list(inputs[row, : LENGTHS[row]].double().numpy())


@pytest.mark.parametrize(
    ("name", "input_layer", "reference"),
    [
        ("dlcm", "linear", dlcm),
        ("dlcm", "concat", dlcm_of_kar),
        ("prm", "linear", prm),
        ("prm", "concat", prm),
        ("setrank", "linear", setrank),
        ("setrank", "concat", setrank),
    ],
)
def test_backbone_equals_its_equations(name, input_layer, reference):
    model, (inputs, mask) = model_of(name, input_layer), lists()
    found = model.rank(inputs, mask).detach().numpy()
    for row, length in enumerate(LENGTHS):
        expected = reference(Weights(model), candidates_of(inputs, row))
        np.testing.assert_allclose(found[row, :length], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("input_layer", ["linear", "concat"])
def test_mir_equals_its_equations(input_layer):
    """The second user has no history; the others have padding before, between and after the items."""
    model, (inputs, mask) = model_of("mir", input_layer), lists()
    real = torch.tensor([[False, True, True, False], [False] * 4, [True, False, True, True]])
    items = torch.randn(3, 4, DIM, generator=torch.Generator().manual_seed(3))
    items = items.where(real.unsqueeze(-1), torch.tensor(100.0))
    stars = torch.tensor([[5.0, 4.0, 1.0, 5.0], [3.0] * 4, [2.0, 2.0, 5.0, 3.0]])
    found = model.rank(inputs, mask, ListHistory(items, real, stars)).detach().numpy()
    for row, length in enumerate(LENGTHS):
        seen = [
            (items[row, h].double().numpy(), int(stars[row, h])) for h in np.flatnonzero(real[row].numpy())
        ]
        expected = mir(Weights(model), candidates_of(inputs, row), seen)
        np.testing.assert_allclose(found[row, :length], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["user", "item"])
def test_hea_equals_its_equations(side):
    """KAR (arXiv 2306.10933), hybrid-expert adaptor: softmax gate over the shared and the side's own experts, each an MLP."""
    torch.manual_seed(0)
    sizes = RerankerArchitecture(
        adapter_dim=4, num_shared_experts=2, num_dedicated_experts=3, expert_hidden_dim=5
    )
    adapter = HybridExpertAdapter(6, sizes)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    vectors = torch.randn(9, 6)
    found = getattr(adapter, f"{side}_side")(vectors).detach().numpy()
    w = Weights(adapter)
    for row, vector in enumerate(vectors.double().numpy()):
        shares = softmax(w.linear(f"{side}_gate", vector))
        expected, used = np.zeros(4), 0
        for group, count in (("shared", 2), (f"{side}_experts", 3)):
            for expert in range(count):
                hidden = w[f"{group}.weight_in"][expert] @ vector + w[f"{group}.bias_in"][expert]
                out = w[f"{group}.weight_out"][expert] @ np.maximum(hidden, 0)
                expected += shares[used] * np.maximum(out + w[f"{group}.bias_out"][expert], 0)
                used += 1
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)
