"""The studies by name, and their questions. To add one: write a file of its name with a STUDY, and a line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo4rec_ray.studies.study_parts import Study

QUESTIONS = {
    "ablation": "Which part of the method is the gain due to?",
    "n_samples": "How many texts per user are worth their cost?",
    "rounds": "What do further rounds add?",
    "reward_metric": "Which reward is worth training on, by all rewards?",
    "backbone_transfer": "Does a reward from one backbone serve another?",
    "beta_loss": "Which preference loss, and which beta?",
    "history_length": "How much of a user's history does the prompt have to show?",
    "drift": "How fast do texts, reranker and policy go stale, and what brings refreshing each?",
    "scale": "What do more users bring, and what do they cost?",
}


def run_name(recipe: str, study: str) -> str:
    """The folder of a study beside the run of its recipe, which has the name `recipe`."""
    return f"{recipe}-study-{study}"


def study_of(name: str) -> Study:
    """The study of this name. Imported only now: a command's help needs the questions alone."""
    return importlib.import_module(f"dpo4rec_ray.studies.{name}").STUDY
