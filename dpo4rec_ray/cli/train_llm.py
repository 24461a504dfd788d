"""Train a small LLM from scratch over a recipe's catalogue, for machines without one.

python jobs/train_llm.py RECIPE.toml --out FOLDER [section.key=value ...]

Runs the stages prepare and bootstrap of the recipe and copies the model folder (safetensors, tokenizer, model card) to
FOLDER, for use as `llm.path=FOLDER`. A recipe with llm.path = "bootstrap" does the same inside its own run.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from dpo4rec_ray.cli import run, session
from dpo4rec_ray.config import load_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store.artifacts import RunDir

KEPT = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="jobs/train_llm.py", description="Train a small LLM over a recipe's catalogue."
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--out", required=True, help="folder for the model; must not exist, or hold only an older model"
    )
    options = parser.parse_intermixed_args()
    return session.guarded(lambda: train(options.recipe, options.overrides, Path(options.out)), verbose=False)


def train(recipe: str, overrides: list[str], target: Path) -> int:
    """Run the two stages, then copy the model folder."""
    strangers = [file.name for file in target.glob("*") if file.name not in KEPT] if target.exists() else []
    if strangers:
        raise UserError(
            f"--out {target}: holds other files ({', '.join(strangers[:3])}); give an empty or new folder"
        )
    overrides = ["llm.path=bootstrap", f"run.name={Path(recipe).stem}-llm", *overrides]
    for stage in ("prepare", "bootstrap"):
        run.run(run.parse([recipe, *overrides, "--only", stage]))
    config = load_config(recipe, overrides)
    folder = RunDir(Path(config.run.root) / config.run.name).path("base_llm")
    target.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        shutil.copyfile(folder / file, target / file)
    print(f"model: {target}")
    return 0
