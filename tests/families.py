"""Tiny models of the LLM families that a user may train: random weights, each family's own architecture.

Sizes are small, everything that makes families differ is kept and made to bite: grouped query heads, tied and separate
heads, biases, query and key norms, sliding windows shorter than the sequences, soft caps near the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 64
WINDOW = 8


def _family(name: str, **arguments: Any) -> Callable[[], PreTrainedConfig]:
    """A maker of configs; weights spread wide enough (initializer_range) that predictions are far from uniform."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return lambda: getattr(transformers, name)(**{**sizes, **arguments})


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _family("LlamaConfig", tie_word_embeddings=False),
    "mistral": _family("MistralConfig", tie_word_embeddings=False, sliding_window=None),
    "mistral-window": _family("MistralConfig", tie_word_embeddings=False, sliding_window=WINDOW),
    # a Llama with a long rotary base and one key head for all queries
    "yi": _family(
        "LlamaConfig",
        tie_word_embeddings=False,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
    ),
    "qwen2.5": _family("Qwen2Config", tie_word_embeddings=True),
    "qwen3": _family("Qwen3Config", tie_word_embeddings=True),
    "gemma2": _family(
        "Gemma2Config",
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma3": _family(
        "Gemma3TextConfig",
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


def tiny_model(name: str) -> PreTrainedModel:
    """A causal LM of the family in float32, the same weights at every call, in eval mode.

    Biases and norms are random too: at their initial 0 and 1 a test would not see them.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()
