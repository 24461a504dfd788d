"""Rows and tokens before the data is read: published counts, what the user knows, and shares of a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dpo4rec_ray.config import Config, load_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.planning.sizes import Sizes, sizes_of_recipe

BOOKS = load_config("amazon_books")
THEN = Sizes(
    users=600, items=320, interactions=18_064, lists=3_514, train=432, valid=108, test=60, prompt_tokens=133.0,
    text_tokens=19.5, pairs=432, heldout_pairs=216,
)  # fmt: skip


def recipe(name: str, *changes: str) -> Config:
    return load_config(name, list(changes))


def test_the_papers_books() -> None:
    """1,406,582 interactions of 11,906 users are 118 each: 15 for the history, 103 in blocks of 4, and half of a last block."""
    found = sizes_of_recipe(BOOKS, {}, None)
    assert (found.users, found.items, found.interactions) == (11_906, 17_332, 1_406_582)
    assert (found.train, found.valid, found.test) == (9_643, 1_072, 1_191)
    assert found.lists == pytest.approx(11_906 * (103.14 / 4 + 3 / 8), rel=1e-3)
    assert found.prompt_tokens == 100 + 20 * 15 and found.text_tokens == 256
    assert (found.pairs, found.heldout_pairs) == (9_643, 2_000)
    assert any("as published for Amazon-Books" in one for one in found.assumed)


def test_the_sample_world_is_near_what_a_run_found() -> None:
    found = sizes_of_recipe(recipe("demo"), {}, None)
    assert found.interactions == pytest.approx(THEN.interactions, rel=0.02)
    assert found.lists == pytest.approx(THEN.lists, rel=0.03)
    assert (found.train, found.valid, found.test) == (THEN.train, THEN.valid, THEN.test)


def test_shares_come_from_the_run() -> None:
    demo, large = recipe("demo"), recipe("demo", "sample.num_users=6000")
    found = sizes_of_recipe(large, {}, (demo, replace(THEN, pairs=216)))
    assert (found.prompt_tokens, found.text_tokens) == (133.0, 19.5)
    assert found.pairs == 2_160  # half of the training users had none
    assert found.heldout_pairs == 2_160
    assert found.lists == pytest.approx(10 * THEN.lists, rel=0.01)


def test_a_prompt_grows_with_its_history() -> None:
    demo = recipe("demo")
    found = sizes_of_recipe(recipe("demo", "data.max_history=4"), {}, (demo, THEN))
    assert found.prompt_tokens == pytest.approx(133 / 2)
    assert any("8 there and 4 here" in one for one in found.assumed)


def test_what_the_user_knows_comes_first() -> None:
    found = sizes_of_recipe(BOOKS, {"users": 1_000, "lists": 7}, None)
    assert (found.users, found.interactions, found.lists) == (1_000, round(1_406_582 / 11_906 * 1_000), 7)
    table = recipe("own_table", "data.raw_dir=x")
    assert sizes_of_recipe(table, {"users": 50, "items": 9, "interactions": 800}, None).interactions == 800
    fewer = recipe("amazon_books", "data.max_users=100")
    assert sizes_of_recipe(fewer, {}, None).users == 100


def test_unknown_data_is_not_guessed() -> None:
    with pytest.raises(UserError, match="say --users N"):
        sizes_of_recipe(recipe("own_table", "data.raw_dir=x"), {}, None)


def test_movielens_1m_is_told_by_its_folder() -> None:
    for folder in ("", "ml-1m", "s3://bucket/ml-1m/"):
        assert sizes_of_recipe(recipe("ml1m", f"data.raw_dir={folder}"), {}, None).users == 6_040
    with pytest.raises(UserError, match="ml-25m"):
        sizes_of_recipe(recipe("ml1m", "data.raw_dir=/data/ml-25m"), {}, None)


def test_counts_of_a_run_on_the_same_data_come_before_published_ones() -> None:
    large = recipe("ml1m", "data.raw_dir=/data/ml-25m")
    then = replace(THEN, users=162_541, items=59_047, interactions=25_000_095)
    for config in (large, recipe("ml1m", "data.raw_dir=/data/ml-25m/"), recipe("ml1m")):
        found = sizes_of_recipe(config, {}, (large, then))
        assert (found.users, found.interactions) == (162_541, 25_000_095)
    trial = recipe("ml1m", "data.raw_dir=ml-1m", "data.max_users=600")
    assert sizes_of_recipe(recipe("ml1m", "data.raw_dir=ml-1m"), {}, (trial, THEN)).users == 6_040
    assert sizes_of_recipe(trial, {}, (trial, THEN)).interactions == THEN.interactions


@pytest.mark.parametrize("change", ["data.raw_dir=/theirs", "data.user_core=20"])
def test_counts_of_other_data_are_not_taken(change: str) -> None:
    mine = recipe("own_table", "data.raw_dir=/mine")
    with pytest.raises(UserError, match="say --users N"):
        sizes_of_recipe(mine, {}, (recipe("own_table", "data.raw_dir=/mine", change), THEN))
    found = sizes_of_recipe(mine, {"users": 50}, (recipe("own_table", "data.raw_dir=/mine", change), THEN))
    assert (found.users, found.interactions, found.text_tokens) == (50, 1_500, THEN.text_tokens)
