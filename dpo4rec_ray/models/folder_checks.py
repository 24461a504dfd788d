"""What can be seen of a model folder before it is loaded: whether it is whole, and whether it can be trained."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

from dpo4rec_ray.errors import UserError, first_line
from dpo4rec_ray.models.gguf_folder import is_gguf

_INDEX = "model.safetensors.index.json"


def check_model_folder(key: str, path: str) -> None:
    """Raises UserError: no folder with a config.json and whole *.safetensors. key: of the recipe, which names the path."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{key} {path}: no such folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{key} {path}: holds no config.json; {_instead(folder)}")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{key} {path}: config.json is not JSON ({error})") from None
    files = set(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{key} {path}: holds no *.safetensors weights; other formats are not loaded, because they can run code"
        )
    if (folder / _INDEX).is_file():
        parts = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        if missing := sorted(set(parts) - {file.name for file in files}):
            raise UserError(f"{key} {path}: {missing[0]} is missing, which {_INDEX} names; download it again")
    for file in sorted(files):
        _check_weights(key, file)


def _instead(folder: Path) -> str:
    files = sorted(file.name for file in folder.iterdir() if is_gguf(file.name))
    return f"name its file {files[0]}" if files else "give the folder of a Hugging Face model"


def _check_weights(key: str, file: Path) -> None:
    """By its header, which says how long the file is: a download that broke off shows here and not in a worker."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{key}: {file} is damaged ({first_line(error)}); download it again") from None


def check_architecture(path: str) -> None:
    """Raises UserError: the LLM is none that can be trained (vLLM knows more, and text encoders). path: folder or hub name."""
    from transformers import PretrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = PretrainedConfig.get_config_dict(path)[0].get("architectures") or []
    if names and not set(names) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        version = importlib.metadata.version("transformers")
        raise UserError(
            f"llm.path {path}: config.json says architectures = {names}; transformers {version} has no such LLM. Set llm.path to "
            "another model"
        )
