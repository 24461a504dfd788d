"""The sources of texts by name: what `llm.source` in a recipe chooses from.

To add a source: a `TextWriter`, a function that returns its `Source`, one line in `SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable

from dpo4rec_ray.config import Config
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.texts.endpoint_texts import endpoint_source
from dpo4rec_ray.texts.offline_texts import statistics_source, table_source, template_source
from dpo4rec_ray.texts.policy_texts import policy_source
from dpo4rec_ray.texts.text_source import Source

# llm.source -> what writes the texts of policy `policy_round`
SOURCES: dict[str, Callable[[Config, RunDir, int], Source]] = {
    "vllm": policy_source,
    "openai": endpoint_source,
    "table": table_source,
    "statistics": statistics_source,
    "template": template_source,
}


def describes_items(config: Config) -> bool:
    """Whether the source writes texts about items too."""
    return config.prompt.describe_items or (config.llm.source == "table" and bool(config.texts.items))
