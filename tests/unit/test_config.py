from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dpo4rec_ray.config import Config, LoggedSection, TableSection, load_config
from dpo4rec_ray.datasets.logged import LoggedSettings
from dpo4rec_ray.datasets.table import TableSettings
from dpo4rec_ray.errors import UserError

RECIPES = sorted((Path(__file__).parents[2] / "jobs" / "recipes").glob("*.toml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "my_recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_in_the_repository_loads(path: Path) -> None:
    assert load_config(path).run.name == path.stem


def test_overrides_win_and_keep_their_types(tmp_path: Path) -> None:
    path = write(tmp_path, "[generate]\nnum_samples = 4\n")
    config = load_config(
        path, ["generate.num_samples=6", "data.raw_dir=some/where", "reranker.similarity=false"]
    )
    assert config.generate.num_samples == 6
    assert config.data.raw_dir == "some/where"
    assert config.reranker.similarity is False
    assert config.run.name == "my_recipe"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[generate]\nnum_sample = 4\n", ["generate.num_sample", "'num_samples'"]),
        ("[generat]\nnum_samples = 4\n", ["[generat]", "'generate'"]),
        ("[generate]\nnum_samples = 0\n", ["generate.num_samples", "0", "greater than or equal to 2"]),
        ("[generate]\nnum_samples = 'many'\n", ["generate.num_samples", "'many'"]),
        ("[data]\nblock_size = 11\n", ["block_size 11", "num_candidates 10"]),
        ("generate = 3\n", ["[generate]", "must be a section"]),
        ("[generate\n", ["not valid TOML"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, text))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("override", ["num_samples=4", "generate.num_samples", "=4", "generate.=4"])
def test_malformed_override(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"section\.key=value"):
        load_config(write(tmp_path, ""), [override])


def test_missing_recipe() -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_config("no/such/recipe.toml")


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().run.seed = 3  # type: ignore[misc]


def test_section_hash_follows_its_sections_and_the_seed() -> None:
    base = Config()
    other = Config.model_validate({"dpo": {"beta": 0.5}})
    seeded = Config.model_validate({"run": {"seed": 1}})
    assert base.section_hash("generate") == other.section_hash("generate")
    assert base.section_hash("dpo") != other.section_hash("dpo")
    assert base.section_hash("generate") != seeded.section_hash("generate")


def test_sections_of_a_source_are_its_settings() -> None:
    """The recipe's sections and what the sources take are written twice; they must not drift apart."""
    for section, settings in ((TableSection, TableSettings), (LoggedSection, LoggedSettings)):
        assert section().model_dump() == dataclasses.asdict(settings())
