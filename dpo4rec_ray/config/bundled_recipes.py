"""The recipes that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from dpo4rec_ray.errors import UserError, nearest

FOLDER = Path(__file__).resolve().parents[1] / "recipes"


def names() -> list[str]:
    """In alphabetical order."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def recipe_file(recipe: str | Path) -> Path:
    """The file that a recipe's name or path means.

    A bare name, without a folder and without .toml, is a bundled recipe's; anything else is a path.

    Raises:
        UserError: a bare name that no bundled recipe has, and no file either.
    """
    path = Path(recipe)
    if path.name != str(recipe) or path.suffix == ".toml":
        return path
    if path.name in names():
        return FOLDER / f"{path.name}.toml"
    if path.is_file():
        return path
    known = [file.name for file in sorted(Path().glob("*.toml"))] if path.suffix else []
    hint = nearest(path.name, known or names())
    raise UserError(f"recipe {path.name!r}: neither a bundled recipe nor a file{hint}")


def purpose(name: str) -> str:
    """What a bundled recipe is for: its first line."""
    return recipe_file(name).read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
