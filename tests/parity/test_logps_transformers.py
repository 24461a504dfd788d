"""Our log-probabilities against the loss and the logits of a tiny random Llama in transformers, float32."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo4rec_ray.core.losses import sequence_logps, token_logps

PAD = 0


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Two layers, 53 words; weights spread wide enough that its predictions are far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config).float().eval()


@pytest.fixture(scope="module")
def sequences() -> list[tuple[list[int], int]]:
    """(token ids, prompt length) of three lengths."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(1, 53, (length,), generator=generator).tolist(), prompt)
        for length, prompt in ((12, 5), (7, 3), (9, 8))
    ]


@torch.no_grad()
def test_sequence_logps_is_the_models_own_loss(
    model: LlamaForCausalLM, sequences: list[tuple[list[int], int]]
) -> None:
    """transformers' loss with prompt labels -100 is the mean NLL of the completion.

    Times its length, our negative sum.
    """
    for ids, prompt in sequences:
        token_ids = torch.tensor([ids])
        mask = torch.arange(len(ids))[None] >= prompt
        output = model(input_ids=token_ids, labels=token_ids.masked_fill(~mask, -100))
        ours = sequence_logps(output.logits, token_ids, mask)
        torch.testing.assert_close(
            ours.float(), -output.loss[None] * (len(ids) - prompt), atol=1e-5, rtol=1e-6
        )


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(
    model: LlamaForCausalLM, sequences: list[tuple[list[int], int]], side: str
) -> None:
    """One padded batch against each sequence alone through torch's own log_softmax, token by token."""
    width = 15  # more than the longest
    token_ids = torch.full((len(sequences), width), PAD)
    attention = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, (ids, prompt) in enumerate(sequences):
        start = 0 if side == "right" else width - len(ids)
        token_ids[row, start : start + len(ids)] = torch.tensor(ids)
        attention[row, start : start + len(ids)] = 1
        mask[row, start + prompt : start + len(ids)] = True
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids=token_ids, attention_mask=attention, position_ids=positions).logits
    per_token = token_logps(logits, token_ids, mask)
    summed = sequence_logps(logits, token_ids, mask)
    assert per_token.shape == (len(sequences), width - 1)
    assert (per_token[~mask[:, 1:]] == 0).all()
    for row, (ids, prompt) in enumerate(sequences):
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        expected = torch.stack([log_probs[t - 1, ids[t]] for t in range(prompt, len(ids))])
        torch.testing.assert_close(per_token[row][mask[row, 1:]], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(summed[row], expected.sum().double(), atol=2e-5, rtol=1e-5)
