from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dpo4rec_ray.rerankers import build_reranker
from dpo4rec_ray.rerankers.dlcm import gru_states


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
    """Its own state looks back; the last candidate reaches the first one's score through s_n."""
    torch.manual_seed(0)
    model = build_reranker("dlcm", small.catalogue.shape, False).eval()
    inputs = torch.randn(1, 6, model.settings.hidden_dim)
    changed = inputs.clone()
    changed[0, -1] *= -1
    (before, _), (after, _) = (gru_states(model.gru, model.norm(x), None) for x in (inputs, changed))
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.allclose(model.rank(inputs, None)[:, 0], model.rank(changed, None)[:, 0])
