"""Preference pairs to other trainers' files, and from them."""

from __future__ import annotations

import functools

from dpo4rec_ray.knowledge.prompts import TEMPLATE_SWITCHES, control_tokens, encode_chat
from dpo4rec_ray.policy.chat_codec import ChatCodec
from dpo4rec_ray.policy.model import load_tokenizer


def codec_of(llm: str) -> ChatCodec:
    """Texts and token ids of an LLM. Its prompts come from the function that makes those of a run."""
    tokenizer = load_tokenizer(llm)
    encode_user = functools.partial(encode_chat, tokenizer)
    return ChatCodec(tokenizer, encode_user, control_tokens(tokenizer), TEMPLATE_SWITCHES)
