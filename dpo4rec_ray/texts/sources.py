"""The sources of texts by name: what `llm.source` in a recipe chooses from.

To add a source: a `TextWriter`, and one line in `SOURCES`.
"""

from __future__ import annotations

from dpo4rec_ray.config import Config
from dpo4rec_ray.texts.endpoint_texts import EndpointTexts
from dpo4rec_ray.texts.offline_texts import StatisticsTexts, TableTexts, TemplateTexts
from dpo4rec_ray.texts.policy_texts import PolicyTexts
from dpo4rec_ray.texts.text_source import TextWriter

SOURCES: dict[str, type[TextWriter]] = {
    "vllm": PolicyTexts,
    "openai": EndpointTexts,
    "table": TableTexts,
    "statistics": StatisticsTexts,
    "template": TemplateTexts,
}


def describes_items(config: Config) -> bool:
    """Whether the source writes texts about items too."""
    return config.prompt.describe_items or (config.llm.source == "table" and bool(config.texts.items))
