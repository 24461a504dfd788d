"""Loading and saving the policy, and its LoRA. Weights travel as safetensors; `trust_remote_code` stays off.

With LoRA the reference is the same model with its LoRA switched off, so a policy's base is its reference, merged: the policy
that its round began with, that its turn began with, or the base LLM itself (policy.reference_policy).
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo4rec_ray.config.training import PolicySection
from dpo4rec_ray.errors import UserError, first_line
from dpo4rec_ray.models.gguf_folder import model_folder
from dpo4rec_ray.storage.local_copies import local_copy
from dpo4rec_ray.storage.places import Place, below, new_folder, write_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POLICY_FILE = "policy.json"
LORA, FULL, MERGED = "lora", "full", "merged"  # folders of the saved weights


@dataclass(frozen=True)
class PolicyWeights:
    """Where a policy's weights are. `merged` is base and LoRA folded into one model folder."""

    base: str
    lora: str | None = None
    merged: str | None = None

    @property
    def whole(self) -> str:
        """The folder or hub name of the complete model, without a LoRA beside it."""
        assert self.merged or not self.lora, "this policy is a LoRA on its base and was not merged"
        return self.merged or self.base


def write_policy(folder: Place, weights: PolicyWeights, record: dict[str, Any]) -> None:
    """Write policy.json beside the weights; paths inside the folder are stored relative to it."""
    stored = {k: _relative(v, folder) for k, v in asdict(weights).items()}
    write_text(folder / POLICY_FILE, json.dumps({**record, **stored}, indent=1, sort_keys=True))


def read_policy(folder: Place) -> PolicyWeights:
    """Read policy.json.

    Raises:
        UserError: the file is missing or incomplete.
    """
    try:
        stored = json.loads((folder / POLICY_FILE).read_text(encoding="utf-8"))
        if "adapter" in stored:  # the former name of "lora"
            stored["lora"] = stored.pop("adapter")
        return PolicyWeights(**{key: _absolute(stored[key], folder) for key in ("base", "lora", "merged")})
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / POLICY_FILE}: not a saved policy ({error}); train it again") from None


def _relative(path: str | None, folder: Place) -> str | None:
    inner = below(path, folder)
    return path if inner is None else f"./{inner}"


def _absolute(path: str | None, folder: Place) -> str | None:
    return str(folder / path.removeprefix("./")) if path and path.startswith("./") else path


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to an LLM.

    Raises:
        UserError: the folder, hub name or .gguf file has no usable tokenizer.
    """
    path = model_folder(path)
    try:
        return _tokenizer_class(path).from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        reason = first_line(error)[:160]
        if Path(path).is_dir():
            hint = "the folder needs tokenizer.json beside config.json"
        else:
            hint = (
                "is this a folder here, or a hub name that this machine can reach or has in its cache (HF_HOME)? A gated "
                "model needs HF_TOKEN"
            )
        raise UserError(f"llm.path {path}: no tokenizer could be loaded ({reason}); {hint}") from None


def _tokenizer_class(path: str) -> Any:
    """The class of the tokenizer, or transformers' search for it, which imports every model: 4 s of each process."""
    try:
        named = json.loads((Path(path) / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        named = {}
    if (named.get("backend"), named.get("tokenizer_class")) == ("tokenizers", "TokenizersBackend"):
        from transformers import TokenizersBackend

        return TokenizersBackend
    from transformers import AutoTokenizer

    return AutoTokenizer


def load_model(
    path: str, dtype: str, *, zero3: dict[str, Any] | None = None, quantize: str = "none"
) -> PreTrainedModel:
    """A causal LM in the given dtype ("float32", "bfloat16", "float16"), on the CPU.

    Args:
        path: folder, hub name or .gguf file.
        dtype: of the weights.
        zero3: DeepSpeed's config, if the weights are to be partitioned over the workers as they are read (ZeRO-3): no
            worker holds the whole model.
        quantize: "4bit" for QLoRA's NF4, on this worker's GPU.

    Raises:
        UserError: bitsandbytes is not installed, or the .gguf file cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if quantize == "4bit":
        options = {"quantization_config": _four_bits(dtype), "device_map": {"": torch.cuda.current_device()}}
    if zero3 is not None:
        from transformers.integrations import HfDeepSpeedConfig

        # from_pretrained asks a weak reference to this object: it must live until the weights are read
        partitioned = HfDeepSpeedConfig(zero3)
    model = AutoModelForCausalLM.from_pretrained(
        model_folder(path),
        dtype=getattr(torch, dtype),
        trust_remote_code=False,
        use_safetensors=True,
        **options,
    )
    if zero3 is not None:
        del partitioned
    return model


def check_bitsandbytes() -> None:
    """Check that it is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            'policy.quantize = "4bit" needs the package bitsandbytes; install it, or set policy.quantize = "none"'
        )


def _four_bits(dtype: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    check_bitsandbytes()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def add_lora(model: PreTrainedModel, section: PolicySection) -> Any:
    """Put a new LoRA on `policy.lora_targets` ("all-linear": every linear layer but the output head); only its weights train.

    The model's output does not change until the first step.

    Raises:
        UserError: no module has such a name.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    names = list(section.lora_targets)
    config = LoraConfig(
        r=section.lora_rank,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=names[0] if names == ["all-linear"] else names,
        init_lora_weights=True if section.lora_init == "default" else section.lora_init,
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"policy.lora_targets = {names}: {first_line(error)[:200]}") from None


def load_lora(model: PreTrainedModel, lora: str) -> Any:
    """Continue training an existing LoRA: of a policy whose base is the reference."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(local_copy(lora)), is_trainable=True)


def checkpoint_activations(model: Any) -> None:
    """Keep one hidden state per layer and compute the rest again in the backward pass."""
    model.enable_input_require_grads()  # else a frozen embedding ends the graph of the first layer
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def gathered_state(model: torch.nn.Module, rank: int, *, trained_only: bool) -> dict[str, torch.Tensor]:
    """Whole weights by name on rank 0, an empty dict elsewhere. Every worker must call it.

    Partitioned weights (ZeRO-3) are gathered one at a time.
    """
    import deepspeed

    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if rank == 0:
                found[name] = parameter.detach().cpu().clone()
    if rank == 0 and not trained_only:
        buffers = dict(model.named_buffers())  # never partitioned
        found |= {name: buffers[name].cpu() for name in model.state_dict().keys() & buffers.keys()}
    return found


def save_model(
    model: Any, tokenizer_path: str, target: Place, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Save a model, or a peft model's LoRA, with its tokenizer. A killed save leaves no folder that looks complete.

    state: its weights by name, where the model itself holds only parts of them.
    """
    with new_folder(target) as temporary:
        model.save_pretrained(temporary, state_dict=state)
        load_tokenizer(tokenizer_path).save_pretrained(temporary)


def save_merged(base: str, lora: str, target: Place, dtype: str) -> None:
    """Fold the LoRA into its base and save a complete model folder, tokenizer included."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base, dtype), str(local_copy(lora)))
    save_complete(model.merge_and_unload(), base, target)


def save_complete(
    model: PreTrainedModel, tokenizer_path: str, target: Place, state: dict[str, torch.Tensor] | None = None
) -> None:
    """`save_model` of a complete model, with its stop tokens as all that is said of sampling."""
    from transformers import GenerationConfig

    # save_pretrained refuses inconsistent sampling settings, and the recipe has its own; the stop tokens must stay
    stops = model.generation_config or model.config
    model.generation_config = GenerationConfig(
        bos_token_id=stops.bos_token_id, eos_token_id=stops.eos_token_id, pad_token_id=stops.pad_token_id
    )
    save_model(model, tokenizer_path, target, state)
