"""Train a small LLM from scratch over a recipe's catalogue, for machines without one.

dpo4rec train-llm RECIPE --out FOLDER [section.key=value ...]

Runs the stages prepare and bootstrap of the recipe and copies the model folder (safetensors, tokenizer, model card) to
FOLDER, for use as `llm.path=FOLDER`. A recipe with llm.path = "bootstrap" does the same inside its own run.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from dpo4rec_ray.cli import run, session
from dpo4rec_ray.cli.arguments import CHANGES, RECIPE, Formatter, examples
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.storage.local_copies import local_copy
from dpo4rec_ray.storage.places import place

KEPT = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dpo4rec train-llm",
        description="Train a small LLM from scratch over a recipe's catalogue, for machines without one.",
        epilog=examples(
            ("dpo4rec train-llm ml1m_small data.raw_dir=FOLDER --out small-llm", "a model folder"),
            ("dpo4rec run ml1m_small data.raw_dir=FOLDER llm.path=small-llm", "a run with it"),
        ),
        formatter_class=Formatter,
    )
    found.add_argument("recipe", **RECIPE)
    found.add_argument("changes", **CHANGES)
    found.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="folder for the model; must not exist, or hold only an older model",
    )
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    return session.guarded(lambda: train(options.recipe, options.changes, Path(options.out)), verbose=False)


def train(recipe: str, changes: list[str], target: Path) -> int:
    """Run the two stages, then copy the model folder."""
    from dpo4rec_ray.config import load_config
    from dpo4rec_ray.store.artifacts import RunDir

    strangers = [file.name for file in target.glob("*") if file.name not in KEPT] if target.exists() else []
    if strangers:
        raise UserError(
            f"--out {target}: holds other files ({', '.join(strangers[:3])}); give an empty or new folder"
        )
    changes = ["llm.path=bootstrap", f"run.name={Path(recipe).stem}-llm", *changes]
    for stage in ("prepare", "bootstrap"):
        run.run(run.parse([recipe, *changes, "--only", stage]))
    config = load_config(recipe, changes)
    folder = RunDir(place(config.run.root) / config.run.name).path("base_llm")
    target.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        shutil.copyfile(local_copy(folder) / file, target / file)
    print(f"model: {target}")
    return 0
