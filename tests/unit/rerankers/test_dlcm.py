from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dpo4rec_ray.rerankers.dlcm import gru_states, normalised
from tests.unit.rerankers.builders import build


def test_states_equal_those_of_packed_sequences():
    torch.manual_seed(0)
    gru, lengths = nn.GRU(3, 4, batch_first=True), torch.tensor([5, 1, 3])
    inputs, mask = torch.randn(3, 5, 3), torch.arange(5) < lengths.unsqueeze(1)
    states, last = gru_states(gru, inputs, mask)
    packed, final = gru(pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False))
    expected, _ = pad_packed_sequence(packed, batch_first=True)
    torch.testing.assert_close(states[mask], expected[mask])
    torch.testing.assert_close(last, final.squeeze(0))


def test_padding_is_skipped_wherever_it_is():
    torch.manual_seed(0)
    gru, inputs = nn.GRU(3, 4, batch_first=True), torch.randn(1, 6, 3)
    mask = torch.tensor([[False, True, False, True, True, False]])
    states, last = gru_states(gru, inputs, mask)
    bare, bare_last = gru_states(gru, inputs[mask].unsqueeze(0), None)
    torch.testing.assert_close(states[mask], bare.squeeze(0))
    torch.testing.assert_close(last, bare_last)
    _, nothing = gru_states(gru, inputs, torch.zeros_like(mask))
    assert torch.equal(nothing, torch.zeros(1, 4))


def test_a_place_sees_those_after_it_through_the_final_state_only(small):
    """A state depends on earlier places; the last candidate changes the first one's score through s_n."""
    torch.manual_seed(0)
    model = build("dlcm", small.catalogue.shape, False).eval()
    inputs = torch.randn(1, 6, model.architecture.hidden_dim)
    changed = inputs.clone()
    changed[0, -1] *= -1
    (before, _), (after, _) = (gru_states(model.gru, model.norm(x), None) for x in (inputs, changed))
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.allclose(model.rank(inputs, None)[:, 0], model.rank(changed, None)[:, 0])


def test_batch_normalisation_by_hand():
    """Real states 1, 3 and 8 (mean 4, variance 26/3, 13 unbiased); momentum 0.1 from mean 0 and variance 1."""
    norm = nn.BatchNorm1d(1, eps=1e-12)
    mask = torch.tensor([[True, True, False], [False, True, False]])
    states = torch.tensor([[1.0, 3.0, 100.0], [-100.0, 8.0, 100.0]]).unsqueeze(-1)
    deviation = (26 / 3) ** 0.5
    expected = torch.tensor([[-3 / deviation, -1 / deviation, 0.0], [0.0, 4 / deviation, 0.0]])
    torch.testing.assert_close(normalised(norm, states, mask).squeeze(-1), expected)
    torch.testing.assert_close(norm.running_mean, torch.tensor([0.4]))
    torch.testing.assert_close(norm.running_var, torch.tensor([0.9 + 1.3]))
    # Once trained: (8 - 0.4) / sqrt(2.2), whatever else is in the batch.
    norm.eval()
    alone = normalised(norm, states[1:, 1:2], None)
    torch.testing.assert_close(alone, torch.tensor([[[7.6 / 2.2**0.5]]]))
    torch.testing.assert_close(normalised(norm, states, mask)[1, 1], alone[0, 0])


def test_batches_with_one_state_or_none(small):
    """One state has no variance: scores and gradients are finite, and the running statistics stay as they are."""
    model = build("dlcm", small.catalogue.shape, False, input_layer="concat").train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    inputs = torch.randn(1, 4, model.embedding.width, requires_grad=True)
    for mask in (torch.tensor([[True, False, False, False]]), torch.zeros(1, 4, dtype=torch.bool)):
        scores = model.rank(inputs, mask)
        scores.sum().backward()
        assert scores.isfinite().all() and inputs.grad.isfinite().all()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
