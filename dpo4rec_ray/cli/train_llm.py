"""Train a small LLM from scratch over a recipe's catalogue, for machines without one.

dpo4rec train-llm RECIPE --out FOLDER [section.key=value ...]

Runs the stages prepare and bootstrap of the recipe and copies the model folder (safetensors, tokenizer, model card) to
FOLDER, for use as `llm.path=FOLDER`. A recipe with llm.path = "bootstrap" does the same inside its own run.
"""

from __future__ import annotations

import argparse
import errno
import os
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

    changes = ["llm.path=bootstrap", f"run.name={Path(recipe).stem}-llm", *changes]
    config = load_config(recipe, changes)
    make_folder(target)  # before the training, which may take hours
    for stage in ("prepare", "bootstrap"):
        run.run(run.parse([recipe, *changes, "--only", stage]))
    folder = RunDir(place(config.run.root) / config.run.name).path("base_llm")
    for file in KEPT:
        shutil.copyfile(local_copy(folder) / file, target / file)
    print(f"model: {target}")
    return 0


def make_folder(target: Path) -> None:
    """Make the model's folder.

    Raises:
        UserError: it cannot be made or written to, or holds other files.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        strangers = [file.name for file in target.glob("*") if file.name not in KEPT]
        if not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:  # such as a file in its place, or above it
        raise UserError(
            f"--out {target}: no folder can be made or written to there ({error.strerror}); give an empty or new folder"
        ) from None
    if strangers:
        raise UserError(
            f"--out {target}: holds other files ({', '.join(strangers[:3])}); give an empty or new folder"
        )
