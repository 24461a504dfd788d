"""Small models of the LLM families a user may name in `llm.path`, made on the spot: random weights, real conventions.

Each family has its architecture from transformers, its own special tokens, its way with BOS and end of turn, and a
chat template in its style. No file of the published models is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo4rec_ray import policy
from dpo4rec_ray.config.texts import GenerateSection, LLMSection
from dpo4rec_ray.knowledge.engine_spec import EngineSpec, ServedWeights
from dpo4rec_ray.knowledge.generator import VLLMGenerator
from dpo4rec_ray.policy.model import load_tokenizer

BUNDLED = Path(policy.__file__).parent / "bundled"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
QWEN2 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "
    "You are a helpful assistant.<|im_end|>\n{% endif %}" + CHATML
)
QWEN3 = CHATML.removesuffix("{% endif %}") + (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """How a family's models are made.

    Attributes:
        config: of transformers, by name, and its arguments beside the sizes that all share.
        bos, eos, pad: as tokenizer_config.json names them; bos None: the family has none.
        special: further special tokens. added: tokens that are added without being special.
        end_of_turn: what ends an answer; beside `eos` in generation_config.
        word_mark: words begin with "▁", as under SentencePiece, instead of a space.
    """

    config: str
    template: str
    bos: str | None
    eos: str
    pad: str
    end_of_turn: str
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    word_mark: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A BPE of about 400 tokens that falls back on bytes, so that every text has token ids."""
        bpe = Tokenizer(models.BPE())
        if self.word_mark:
            bpe.normalizer = normalizers.Replace(" ", "▁")
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = (
            decoders.Sequence([decoders.ByteLevel(), decoders.Replace("▁", " ")])
            if self.word_mark
            else decoders.ByteLevel()
        )
        bpe.train_from_iterator(
            ["Analyse this user's preferences, with reasons, by genre, era, creator. History: stars"] * 2,
            trainers.BpeTrainer(
                vocab_size=330,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe, bos_token=self.bos, eos_token=self.eos, pad_token=self.pad
        )
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in self.special])
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in self.added])
        tokenizer.chat_template = self.template
        return tokenizer

    def write(self, folder: Path) -> Path:
        """Model, tokenizer and generation_config as a model folder, safetensors."""
        import torch
        import transformers

        tokenizer = self.tokenizer()
        ids = {name: tokenizer.convert_tokens_to_ids(getattr(self, name)) for name in ("eos", "pad")}
        stops = sorted({ids["eos"], tokenizer.convert_tokens_to_ids(self.end_of_turn)})
        config = getattr(transformers, self.config)(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=ids["eos"],
            pad_token_id=ids["pad"],
            initializer_range=0.2,
            **self.arguments,
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():  # in some contexts the end of turn is likely, so that samples end by themselves
            model.get_output_embeddings().weight[stops[-1]].mul_(2)
        model.generation_config = transformers.GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=stops, pad_token_id=ids["pad"]
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder


FAMILIES = {
    "llama": Family(
        "LlamaConfig",
        LLAMA,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|finetune_right_pad_id|>",
        "<|eot_id|>",
        special=(
            "<|reserved_special_token_0|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
            "<|python_tag|>",
        ),
        arguments={"tie_word_embeddings": False},
    ),
    "mistral": Family(
        "MistralConfig",
        MISTRAL,
        "<s>",
        "</s>",
        "<unk>",
        "</s>",
        special=(
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
            "[control_8]",
        ),
        word_mark=True,
        arguments={"tie_word_embeddings": False, "sliding_window": None},
    ),
    "yi": Family(  # a Llama that speaks ChatML; its template writes no BOS
        "LlamaConfig",
        CHATML,
        "<|startoftext|>",
        "<|endoftext|>",
        "<unk>",
        "<|im_end|>",
        special=("<|im_start|>", "<|im_end|>", "<|im_sep|>"),
        added=("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<file_sep>"),
        word_mark=True,
        arguments={"tie_word_embeddings": False},
    ),
    "qwen2.5": Family(
        "Qwen2Config",
        QWEN2,
        None,
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_end|>",
        special=("<|im_start|>", "<|object_ref_start|>", "<|box_start|>", "<|vision_pad|>"),
        added=("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|repo_name|>", "<|file_sep|>"),
        arguments={"tie_word_embeddings": True},
    ),
    "qwen3": Family(
        "Qwen3Config",
        QWEN3,
        None,
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_end|>",
        special=("<|im_start|>", "<|object_ref_start|>", "<|vision_pad|>"),
        added=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
        arguments={"tie_word_embeddings": True},
    ),
    "gemma": Family(
        "Gemma3TextConfig",
        GEMMA,
        "<bos>",
        "<eos>",
        "<pad>",
        "<end_of_turn>",
        special=("<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<unused0>"),
        added=("[multimodal]", "<table>", "</table>", "<h1>", "[@BOS@]"),
        word_mark=True,
        arguments={"sliding_window": 64, "query_pre_attn_scalar": 32},
    ),
}


@pytest.fixture(scope="session", params=[*FAMILIES, "bundled"])
def chat_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """The tokenizer of each family, and of the bundled LLM."""
    if request.param == "bundled":
        return load_tokenizer(str(BUNDLED))
    return FAMILIES[request.param].tokenizer()


@pytest.fixture(scope="session")
def bundled() -> Path:
    """Folder of the bundled LLM."""
    return BUNDLED


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a family -> its model folder, made at the first call."""
    root, made = tmp_path_factory.mktemp("families"), dict[str, Path]()

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = FAMILIES[name].write(root / name)
        return made[name]

    return folder


# A KV cache of a few MiB: vLLM's smallest would be 1 GiB, which takes seconds to make and stays.
SMALL_CACHE = {"num_gpu_blocks_override": 256}


class _ModulesOfVLLM:
    """`sys` for the one file of vLLM 0.32 that asks everything in every loaded module for its __dict__ (_rebind_kernels).

    It looks for its own kernels, and others may answer with an error: a proxy of Flask's (schemathesis imports Flask where
    it is installed, as it is with moto), a C library of llvmlite's (ranx imports it). Processes of the product load none
    of these beside an engine.
    """

    @property
    def modules(self) -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm"}


@pytest.fixture(scope="module")
def start_engine() -> Iterator[Callable[..., VLLMGenerator]]:
    """(model, section, ...) -> an engine in this process, which afterwards is as it was, except for memory."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr("vllm.triton_utils.dispatcher.sys", _ModulesOfVLLM())

        def start(
            model: Path | str, generate: GenerateSection, max_model_len: int = 512, **at_run_time: Any
        ) -> VLLMGenerator:
            llm = LLMSection(max_model_len=max_model_len)
            small = generate.model_copy(update={"engine_args": SMALL_CACHE})
            return VLLMGenerator(EngineSpec(ServedWeights(str(model)), llm, small, **at_run_time))

        yield start
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()  # other tests make process groups of their own
    torch.set_num_threads(threads)
