"""Which weights a round uses, and where they are."""

from __future__ import annotations

from pathlib import Path

from dpo4rec_ray.config import Config
from dpo4rec_ray.models.gguf_folder import content_hash, is_gguf
from dpo4rec_ray.policy.model import PolicyWeights, read_policy
from dpo4rec_ray.store.artifacts import RunDir, folder_hash


def base_llm_path(config: Config, store: RunDir) -> str:
    """Folder or .gguf file (absolute: workers have a working directory of their own), or hub name of policy 0."""
    if config.llm.path == "bundled":
        return str(Path(__file__).resolve().parents[1] / "policy" / "bundled")
    if config.llm.path == "bootstrap":
        return str(store.path("base_llm"))
    if "://" in config.llm.path:
        return config.llm.path
    folder = Path(config.llm.path).expanduser()
    return str(folder.resolve()) if folder.exists() else config.llm.path


def model_identity(path: str) -> str:
    """What stands for a model's content: a folder's or .gguf file's hash, or a hub name with the commit that is in the cache.

    A hub name alone where neither the cache nor the hub has its config.json.
    """
    if "://" in path or Path(path).is_dir():
        return folder_hash(path)
    if is_gguf(path):
        return content_hash(path)
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    try:
        return f"{path}@{extract_commit_hash(cached_file(path, 'config.json'), None)}"
    except OSError:
        return path


def policy_weights(config: Config, store: RunDir, round_id: int) -> PolicyWeights:
    """Where the weights of policy `round_id` are; 0 is the base LLM."""
    if round_id == 0:
        return PolicyWeights(base=base_llm_path(config, store))
    store.require("policy", round_id)
    return read_policy(store.path("policy", round_id))


def merges_lora(config: Config) -> bool:
    """Whether vLLM gets round r's policy as a merged folder; "auto" is the mode that was verified for the device."""
    on_gpu = config.generate.gpus_per_engine > 0
    return config.llm.lora_mode == "merged" or (config.llm.lora_mode == "auto" and not on_gpu)
