"""What is known of the LLM that a run began with, for the card of a model that was trained from it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from dpo4rec_ray.config import Config
from dpo4rec_ray.exchange.model_card import public
from dpo4rec_ray.models.gguf_folder import is_gguf
from dpo4rec_ray.models.published import PUBLISHED_MODELS
from dpo4rec_ray.policy.model import POLICY_FILE
from dpo4rec_ray.store.artifacts import RunDir


@dataclass(frozen=True)
class BaseLLM:
    """
    Attributes:
        text: what it is, in Markdown.
        hub: its name on the hub; "" where it has none.
        terms: in brief; "" where they are not known.
        licence: the hub's name for them; "" where there is none.
    """

    text: str
    hub: str = ""
    terms: str = ""
    licence: str = ""


def base_llm(config: Config, store: RunDir) -> BaseLLM:
    """The LLM of a run that has a first policy. Names of folders and files are shortened to their last part."""
    path = config.llm.path
    if path == "bundled":
        return BaseLLM(
            'the small LLM that comes with dpo4rec_ray (`llm.path = "bundled"`)',
            terms="Apache-2.0, as dpo4rec_ray",
        )
    if path == "bootstrap":
        return BaseLLM(
            'a small LLM that the run trained from scratch (`llm.path = "bootstrap"`)',
            terms="those of the data, from whose catalogue it learned",
        )
    content = trained_from(store, 1)
    name, _, revision = content.partition("@")
    if name == path:
        at = f" at revision `{revision}`" if revision else ""
        return BaseLLM(f"[{path}](https://huggingface.co/{path}){at}", hub=path)
    text = (
        f"`{public(path)}`, a {'.gguf file' if is_gguf(path) else 'local folder'} (content hash `{content}`)"
    )
    for one in PUBLISHED_MODELS.values():
        if content and is_gguf(path) and one.sha256.startswith(content):
            return BaseLLM(text, terms=f"{one.terms} ({one.link})", licence=one.licence)
    return BaseLLM(text)


def trained_from(store: RunDir, number: int) -> str:
    """What stands for the model that the training of policy `number` began with (`store.policies.model_identity`)."""
    file = store.path("policy", number) / POLICY_FILE
    return str(json.loads(file.read_text(encoding="utf-8")).get("base_hash", ""))
