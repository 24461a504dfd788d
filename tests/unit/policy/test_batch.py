from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo4rec_ray.policy.batch import collate
from dpo4rec_ray.policy.logps import CompletionLogps

PROMPTS = [[1, 5, 6, 7, 8], [1, 9]]
COMPLETIONS = [[10, 11, 2], [12, 13, 14, 15, 2]]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        dtype="float32",
    )
    return LlamaForCausalLM(config).eval()


def test_left_padding_by_hand() -> None:
    """Rows of 8 and 7 tokens: the second is padded by one on the left, completions end in the last column."""
    batch = collate(PROMPTS, COMPLETIONS, pad_id=0)
    assert batch.token_ids.tolist() == [[1, 5, 6, 7, 8, 10, 11, 2], [0, 1, 9, 12, 13, 14, 15, 2]]
    assert batch.attention_mask.tolist() == [[1] * 8, [0] + [1] * 7]
    assert batch.completion_mask.sum(-1).tolist() == [3, 5]
    assert batch.completion_mask[:, -1].all()
    assert batch.num_completion == 5


def test_logps_do_not_depend_on_padding_or_on_logits_to_keep() -> None:
    """Against log-softmax of each unpadded sequence alone."""
    model = tiny_model()
    with torch.no_grad():
        found = CompletionLogps(model)(collate(PROMPTS, COMPLETIONS, pad_id=0))
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            ids = torch.tensor([prompt + completion])
            logps = model(ids).logits.log_softmax(-1)[0]
            expected = sum(logps[len(prompt) + i - 1, token] for i, token in enumerate(completion))
            torch.testing.assert_close(found[row], expected.double(), atol=1e-5, rtol=0)
