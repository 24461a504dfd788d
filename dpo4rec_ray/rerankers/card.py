"""reranker.json beside every saved reranker, and the model card made from it: architecture, data, training, metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.storage.places import place

CARD_FILE = "reranker.json"
TEMPLATE = """---
{{ card_data }}
---

# Reranker {{ settings.backbone }}, {{ knowledge_used }}
{% if info.system %}
System `{{ info.system }}`, seed {{ info.seed or 0 }}.
{% endif %}
Scores the candidates of a list together. Load it with `dpo4rec_ray.rerankers.fit.load_reranker(folder, catalogue)`: weights are
safetensors, settings are JSON, and nothing is unpickled. It works with the catalogue below and with no other.
{% for title, rows in tables.items() if rows %}
## {{ title }}

| | |
|---|---|
{% for name, value in rows.items() -%}
| {{ name }} | {{ value }} |
{% endfor %}{% endfor %}
{%- if info.commit %}
Made by dpo4rec_ray at commit {{ info.commit }}.
{% endif -%}
"""


def read_card(folder: str | Path) -> dict[str, Any]:
    """Content of reranker.json. Raises UserError if it is missing or damaged."""
    file = place(folder) / CARD_FILE
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror or 'not there'}); run the stage that trains this reranker"
        ) from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); train this reranker again") from None
    if "figures" in card["info"]:  # the former name
        card["info"]["metrics"] = card["info"].pop("figures")
    return card


def card_text(card: Mapping[str, Any]) -> str:
    """The model card in Markdown, from the content of reranker.json. Tables without a value are left out.

    card: "settings", "knowledge" and "catalogue" as `save_reranker` writes them; "info" may hold "system", "seed",
    "data", "fit", "metrics" and "versions" (JSON objects) and "commit".
    """
    settings, info = card["settings"], card["info"]
    catalogue = {f"catalogue {name}": value for name, value in card["catalogue"].items()}
    tables = {
        "Data and protocol": info.get("data", {}),
        "Architecture": settings | catalogue,
        "Training": info.get("fit", {}),
        "Metrics": info.get("metrics", {}),
        "Versions": info.get("versions", {}),
    }
    found = ModelCard.from_template(
        ModelCardData(library_name="dpo4rec_ray", tags=["reranker", settings["backbone"]]),
        template_str=TEMPLATE,
        settings=settings,
        info=info,
        knowledge_used=f"with knowledge through the {settings['adapter']} adapter"
        if card["knowledge"]
        else "without knowledge",
        tables={
            title: {name: _shown(value) for name, value in rows.items()} for title, rows in tables.items()
        },
    )
    return str(found)


def _shown(value: Any) -> str:
    is_plain = isinstance(value, float) and 0.001 <= abs(value) < 1000
    return (f"{value:.4f}" if is_plain else str(value)).replace("|", "\\|")
