"""The change to try first: a sound recipe that differs, for every advice that names one."""

from __future__ import annotations

import pytest

from dpo4rec_ray.checks import check_all
from dpo4rec_ray.config import load_config
from dpo4rec_ray.evaluation.advice import ADVICE, COLLAPSE, COUNTED, HARMS, NOISE, TEST, UNREAD
from dpo4rec_ray.evaluation.next_change import RULES, next_change

# What comes first there is to look at prompts and texts.
LOOK_FIRST = {"text accuracy", "fit to later likes", COUNTED}


def test_every_advice_has_a_change_or_none_on_purpose() -> None:
    assert RULES.keys() == ADVICE.keys() - LOOK_FIRST
    assert all(next_change(name, load_config("demo"), True) == () for name in LOOK_FIRST)


@pytest.mark.parametrize(
    "recipe", ["demo", "ml1m_real_small", "ml1m_statistics", "amazon_books", "own_table"]
)
@pytest.mark.parametrize("name", RULES)
def test_the_change_is_a_sound_recipe_that_differs(name: str, recipe: str) -> None:
    """And every stage that it concerns takes it."""
    config = load_config(recipe)
    if changes := next_change(name, config, True):
        changed = load_config(recipe, list(changes))
        assert changed != config
        if recipe == "demo":  # the others' data is not here
            check_all(changed, "")


@pytest.mark.parametrize(
    ("name", "recipe", "keys", "expected"),
    [
        ("reading gain", "demo", [], ("pair.others_share=0.5",)),
        ("style gain", "demo", ["pair.others_share=0.5"], ("reward.personal=12",)),
        ("style gain", "demo", ["pair.others_share=0.5", "reward.personal=12"], ("sample.num_users=1800",)),
        ("reading gain in NDCG@5", "ml1m_real_small", [], ("data.max_users=3000",)),
        ("reading gain", "demo", ["policy.objective=grpo"], ("reward.personal=12",)),
        (UNREAD, "demo", ['reward.reader=["llm"]'], ('reward.reader=["statistics"]',)),
        (
            UNREAD,
            "demo",
            ['reward.reader=["llm"]', "run.retrain_reward=true", "run.num_rounds=2"],
            ('reward.reader=["statistics", "llm"]',),
        ),
        (NOISE, "demo", ["reward.metric=ndcg@5"], ("reward.metric=log_likelihood",)),
        (NOISE, "demo", ["reward.num_redraws=4"], ("reward.num_redraws=8",)),
        (COLLAPSE, "demo", ["policy.lr=3e-4"], ("policy.lr=0.0001",)),
        (TEST, "ml1m_real_small", [], ("data.max_users=3000",)),
        (TEST, "ml1m_statistics", ["data.test_frac=0.2"], ("data.test_frac=0.3",)),
        (TEST, "ml1m_statistics", ["data.test_frac=0.3"], ()),
        ("held-out reward", "amazon_books", [], ()),
        (HARMS, "demo", [], ("run.seed=1",)),
        (UNREAD, "ml1m_statistics", [], ()),
        ("DPO accuracy", "amazon_books", [], ("pair.rule=top_vs_bottom", "pair.pairs_per_user=3")),
        ("DPO accuracy", "amazon_books", ["pair.num_rejected=2"], ("policy.epochs=4",)),
    ],
)
def test_the_change(name: str, recipe: str, keys: list[str], expected: tuple[str, ...]) -> None:
    assert next_change(name, load_config(recipe, keys), True) == expected


def test_users_that_the_data_does_not_have_are_not_asked_for() -> None:
    recipe = load_config("ml1m_real_small")
    assert next_change("held-out reward", recipe, True) == ("data.max_users=3000",)
    assert next_change("held-out reward", recipe, False) == ()
