"""The model card of what a run gives to others: what it is, how it was made, its figures with intervals, and its limits.

Paths of machines become the last part of their names; nothing of a user is in a card.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import tomli_w
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.intervals import signed
from dpo4rec_ray.datasets.publishers import TERMS
from dpo4rec_ray.evaluation.heldout_texts import LABELS
from dpo4rec_ray.evaluation.systems import HEADLINE, TITLES, label

TEMPLATE = "model_card.md.jinja"
HELD_OUT = ("reward", "reading", "reading_ndcg", "others_reward", "others_ndcg")
# What says nothing of how a model was made.
_LEFT_OUT: Any = {"serving": True, "openai": True, "run": {"root"}}


def card(data: ModelCardData, config: Config, summary: Mapping[str, Any], **values: Any) -> ModelCard:
    """The card from the template. summary: of summary.json, empty where the run has none; values: the template's others."""
    template = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    return ModelCard.from_template(
        data,
        template_str=template,
        run=config.run.name,
        seed=config.run.seed,
        dataset=config.data.dataset,
        counts=summary.get("prepare", {}),
        terms=TERMS.get(config.data.dataset, ""),
        recipe=recipe_text(config),
        **values,
    )


def recipe_text(config: Config) -> str:
    """The values of the recipe that are not the defaults, as TOML."""
    values = config.model_dump(mode="json", exclude_defaults=True, exclude_none=True, exclude=_LEFT_OUT)
    return tomli_w.dumps(public(values), multiline_strings=True)


def public(value: Any) -> Any:
    """A value of a recipe or record with paths and URIs cut down to the last part of their names."""
    if isinstance(value, dict):
        return {key: public(one) for key, one in value.items()}
    if isinstance(value, list):
        return [public(one) for one in value]
    if isinstance(value, str) and not any(map(str.isspace, value)) and _is_place(value):
        return value.rstrip("/").rpartition("/")[2]
    return value


def _is_place(text: str) -> bool:
    return text.startswith(("/", "~", "./", "../")) or "://" in text


def heldout_rows(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    """How a round changed the figures of the held-out users. figures: as `validate` has them."""
    return [
        {
            "name": LABELS[name],
            "before": f"{figures[name]['before']:.4f}",
            "after": f"{figures[name]['after']:.4f}",
            "change": signed(figures[name]["change"], figures[name]["change_ci95"]),
            "users": str(figures[name]["users"]),
        }
        for name in HELD_OUT
        if name in figures
    ]


def test_rows(summary: Mapping[str, Any], system: str, backbone: str = "") -> list[dict[str, str]]:
    """A system on the test lists, beside each that it is compared with; with `backbone` ("": with every one)."""
    means = {(row["backbone"], row["system"]): row for row in summary.get("systems", ())}
    return [
        {
            "backbone": label(row["backbone"]),
            "metric": TITLES[row["metric"]],
            "value": f"{means[row['backbone'], system][row['metric']]:.4f}",
            "against": row["against"],
            "difference": signed(row["delta"], row["ci95"]),
        }
        for row in summary.get("comparisons", ())
        if row["system"] == system and row["metric"] in HEADLINE and backbone in ("", row["backbone"])
    ]


def eval_results(config: Config, summary: Mapping[str, Any], system: str, task: str) -> list[EvalResult]:
    """The headline metrics of a system on the test lists, means over seeds, as the hub reads them."""
    return [
        EvalResult(
            task_type=task,
            task_name="reranking of candidate lists",
            dataset_type=config.data.dataset,
            dataset_name=f"{config.data.dataset}, test lists",
            metric_type=metric,
            metric_name=f"{TITLES[metric]}, {label(row['backbone'])}, mean of {row['seeds']} fits",
            metric_value=round(row[metric], 4),
        )
        for row in summary.get("systems", ())
        if row["system"] == system
        for metric in HEADLINE
    ]
