"""What the tests against TRL share: a small model, a tokenizer of whole words, and how results are compared."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = 1, 2
TEXT = "the a user likes drama comedy films of old new long short and with hope"
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *TEXT.split()]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, one BOS in front."""
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def encode(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).float()


@dataclass
class Outcome:
    loss: float
    gradients: dict[str, torch.Tensor]
    metrics: dict[str, float]

    def assert_equals(self, other: Outcome) -> None:
        """Loss to 1e-5 relative, gradients to 1e-5 of the largest."""
        assert self.loss == pytest.approx(other.loss, rel=1e-5)
        assert self.gradients.keys() == other.gradients.keys()
        largest = max(gradient.abs().max().item() for gradient in other.gradients.values())
        assert largest > 1e-3
        for name, gradient in other.gradients.items():
            difference = (self.gradients[name] - gradient).abs().max().item()
            assert difference <= 1e-5 * largest, f"{name}: off by {difference / largest:.2g}"


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
