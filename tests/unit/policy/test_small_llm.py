"""The small LLM's tokenizer: one token per word, lossless on any text, one BOS, loadable offline."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaForCausalLM

from dpo4rec_ray.config.training import BootstrapSection
from dpo4rec_ray.policy.model import load_tokenizer
from dpo4rec_ray.policy.small_llm import (
    ASSISTANT,
    BOS,
    END,
    SPECIAL_TOKENS,
    USER,
    build_tokenizer,
    small_llama_config,
    supervised_rows,
)

PROMPT = (
    '"Silent Harbor" (Sci-Fi; 1980s; Okafor), 5 stars; "Men (1994)" (Children\'s; 1990s), 2 stars; Likes?'
)
TEXT = "Judging by the ratings: enjoys Sci-Fi and Children's, films of the 1980s, by Okafor."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer([PROMPT, TEXT], path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_loading_it_imports_no_model_and_gives_the_same_tokenizer(folder, tokenizer):
    script = (
        "import sys; from dpo4rec_ray.policy.model import load_tokenizer\n"
        "print(load_tokenizer(sys.argv[1]).encode(sys.argv[2]), 'transformers.models.auto' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, folder, PROMPT], capture_output=True, text=True)
    assert done.stdout.strip() == f"{tokenizer.encode(PROMPT)} False", done.stderr
    mine = load_tokenizer(str(folder))
    assert type(mine) is type(tokenizer)
    assert (
        mine.chat_template == tokenizer.chat_template
        and mine.special_tokens_map == tokenizer.special_tokens_map
    )


@pytest.mark.parametrize("word", ["Silent", "Harbor", "Sci-Fi", "Children's", "1980s", "Okafor", "Judging"])
def test_every_word_is_one_token_with_and_without_a_leading_space(tokenizer, word: str):
    assert len(tokenizer.encode(word, add_special_tokens=False)) == 1
    assert len(tokenizer.encode(" " + word, add_special_tokens=False)) == 1


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60).filter(lambda t: not any(s in t for s in SPECIAL_TOKENS)))
def test_any_text_comes_back_unchanged(tokenizer, text: str):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text.encode("utf-8", "replace").decode()


def test_the_templated_prompt_holds_one_bos_and_the_completion_ends_in_eos(tokenizer):
    (prompt,), (completion,) = supervised_rows(tokenizer, [PROMPT], [TEXT])
    bos, eos = tokenizer.convert_tokens_to_ids(BOS), tokenizer.convert_tokens_to_ids(END)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (bos, eos)
    assert prompt[0] == bos and prompt.count(bos) == 1 and eos not in prompt
    assert prompt[1] == tokenizer.convert_tokens_to_ids(USER)
    assert prompt[-1] == tokenizer.convert_tokens_to_ids(ASSISTANT)
    assert completion[-1] == eos and completion.count(eos) == 1
    assert tokenizer.decode(completion[:-1]) == TEXT
    assert bos not in tokenizer.encode(PROMPT)


def test_the_vocabulary_keeps_its_bound_and_frequent_words_come_first(tmp_path):
    texts = ["often " * 50 + "seldom"]
    small = build_tokenizer(texts, tmp_path, max_vocab_size=len(SPECIAL_TOKENS) + 256 + 1)
    assert len(small) == len(SPECIAL_TOKENS) + 257
    assert len(small.encode(" often")) == 1 and len(small.encode(" seldom")) == len(" seldom")


def test_build_is_deterministic(tmp_path, folder):
    build_tokenizer([PROMPT, TEXT], tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_the_small_llama_fits_its_bounds(tokenizer):
    config = small_llama_config(len(tokenizer), BootstrapSection())
    model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert config.tie_word_embeddings and config.eos_token_id == tokenizer.eos_token_id
    assert config.bos_token_id == tokenizer.bos_token_id and config.pad_token_id == tokenizer.pad_token_id
    with pytest.raises(ValueError, match="heads"):
        small_llama_config(1000, BootstrapSection(), num_heads=8)
    with pytest.raises(ValueError, match="million"):
        small_llama_config(40_000, BootstrapSection())
