"""A small LLM for machines that have none: its tokenizer, its shape and its supervised rows.

Not in the paper. The pure parts are here; the stage bootstrap joins them with a catalogue and trains with the DPO trainer.
A prototype with sub-word tokens wrote fluent texts that did not depend on the history: a model this small cannot put the
pieces together. So every word of the training texts is one token, and only unseen words are spelled in bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo4rec_ray.config.training import BootstrapSection
from dpo4rec_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

BOS, USER, ASSISTANT, END, PAD = "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
MAX_VOCAB_SIZE = 8192
INTERMEDIATE_SIZE, MAX_POSITIONS = 256, 1024
# Standard deviation of the first weights. The usual 0.02 suits much wider models: with it the small LLM did not use the
# history after 300 steps, with 0.06 it did by step 200.
INITIALIZER_RANGE = 0.06
SPECIAL_TOKENS = (PAD, BOS, END, USER, ASSISTANT)
# The template writes BOS itself and the tokenizer adds none, so a templated prompt holds exactly one.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Words keep inner hyphens, apostrophes and digits (Sci-Fi, Children's, 1980s); punctuation runs and spaces
# stand alone.
WORD_PATTERN = r" ?[\p{L}\p{N}](?:[\p{L}\p{N}'\-]*[\p{L}\p{N}])?| ?[^\s\p{L}\p{N}]+|\s+"


def build_tokenizer(
    texts: Sequence[str], folder: str | Path, max_vocab_size: int = MAX_VOCAB_SIZE
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which every word of `texts` is one token, saved in `folder`.

    The model is a byte-level BPE with no merges and `ignore_merges`: a word of the vocabulary is taken
    whole and anything else is spelt in bytes, so any text comes back unchanged. Trained merges would reach
    the same words only through thousands of intermediate pieces. Words enter by frequency until
    `max_vocab_size`; then each word's twin with, or without, the leading space, while there is room.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    counts = Counter(piece for text in texts for piece, _ in splitter.pre_tokenize_str(text))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    space = splitter.pre_tokenize_str(" ")[0][0]
    twins = [w[len(space) :] if w.startswith(space) else space + w for w in words if w.strip(space)]
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for piece in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *words, *twins]:
        if len(vocab) < max_vocab_size:
            vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))
    return fast


def small_llama_config(vocab_size: int, section: BootstrapSection, *, num_heads: int = 4) -> LlamaConfig:
    """A small Llama in float32 with tied embeddings; token ids are those of `build_tokenizer`.

    Raises:
        UserError: a head width other than 32 or 64 (what vLLM's CPU attention takes), or over 3 million
        parameters.
    """
    from transformers import LlamaConfig

    hidden_size, num_layers = section.hidden_size, section.num_layers
    if hidden_size // num_heads not in (32, 64) or hidden_size % num_heads:
        raise UserError(
            f"hidden_size / num_heads = {hidden_size} / {num_heads}: vLLM on CPU needs heads of 32 or 64"
        )
    size = vocab_size * hidden_size + num_layers * hidden_size * (4 * hidden_size + 3 * INTERMEDIATE_SIZE)
    if size > 3_000_000:
        raise UserError(
            f"{size} parameters: the small LLM has at most 3 million; lower max_vocab_size or hidden_size"
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(END),
        initializer_range=INITIALIZER_RANGE,
        dtype="float32",
    )


def supervised_rows(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], texts: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the templated prompts (one BOS, ready for the answer) and of the texts (EOS added)."""
    templated = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    prompt_ids = tokenizer(templated, add_special_tokens=False)["input_ids"]
    text_ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return prompt_ids, [[*ids, tokenizer.eos_token_id] for ids in text_ids]
