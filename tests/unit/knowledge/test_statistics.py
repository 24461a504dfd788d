"""The counted text: hand-worked values, what a random half may say, and its bounds."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo4rec_ray.knowledge.statistics import (
    MAX_TITLES,
    StatisticsGenerator,
    statistical_text,
    typical_sentence,
    typical_values,
)

TITLES = ["Alpha", "Beta", "Gamma", "Delta", "Epsilon"]
RATINGS = [4.0, 2.0, 5.0, 4.0, 5.0]
ATTRIBUTES = [
    ["genre: Drama", "era: 1990s"],
    ["genre: Horror", "era: 1990s"],
    ["genre: Comedy", "genre: Drama", "era: 1980s"],
    ["genre: Drama", "era: 1980s"],
    ["genre: Comedy", "era: 1990s"],
]


def test_values_with_counts_then_titles_best_and_latest_first() -> None:
    """Liked, best first, latest of equals first: Epsilon, Gamma, Delta, Alpha. Among them Drama is thrice; Comedy, 1990s
    and 1980s are twice, met in this order."""
    assert statistical_text(TITLES, RATINGS, ATTRIBUTES, like_at=4) == (
        "This user likes Drama (3), Comedy (2), 1990s (2), 1980s (2). Liked: Epsilon; Gamma; Delta; Alpha."
    )


def test_the_threshold_decides_what_is_liked() -> None:
    assert statistical_text(TITLES, RATINGS, ATTRIBUTES, like_at=5) == (
        "This user likes Comedy (2), 1990s (1), Drama (1), 1980s (1). Liked: Epsilon; Gamma."
    )


def test_implicit_feedback_likes_everything_latest_first() -> None:
    assert statistical_text(TITLES, [1.0] * 5, ATTRIBUTES, like_at=None) == (
        "This user likes 1990s (3), Drama (3), Comedy (2), 1980s (2), Horror (1). "
        "Liked: Epsilon; Delta; Gamma; Beta; Alpha."
    )


def test_only_the_most_frequent_values_are_named() -> None:
    attributes = [[f"tag: v{i}" for i in range(7)], [f"tag: v{i}" for i in range(2, 7)]]
    text = statistical_text(["A", "B"], [5.0, 5.0], attributes, like_at=4)
    assert text == "This user likes v2 (2), v3 (2), v4 (2), v5 (2), v6 (2). Liked: B; A."


def test_a_value_that_an_item_names_twice_counts_once() -> None:
    attributes = [["genre: Drama", "genre: Drama"]]
    assert statistical_text(["A"], [5.0], attributes, like_at=4) == "This user likes Drama (1). Liked: A."


def test_without_attributes_titles_alone() -> None:
    assert statistical_text(["A", "B"], [5.0, 5.0], [[], []], like_at=4) == "Liked: B; A."


def test_nothing_liked_and_nothing_seen_is_said() -> None:
    attributes = [["genre: Drama"], ["genre: Drama"]]
    assert (
        statistical_text(["A", "B"], [1.0, 2.0], attributes, like_at=4)
        == "This user liked none of these: B; A."
    )
    assert statistical_text([], [], [], like_at=4) == "Nothing is known about this user's tastes."


def test_columns_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 titles, 1 ratings, 2 rows"):
        statistical_text(["A", "B"], [5.0], [[], []], like_at=4)


def test_a_variant_counts_and_names_a_random_half() -> None:
    """Eight liked events, each with its own value and the common one: any four of them."""
    titles = [f"T{i}" for i in range(8)]
    attributes = [["genre: Drama", f"maker: M{i}"] for i in range(8)]
    named: set[str] = set()
    for seed in range(20):
        text = statistical_text(titles, [5.0] * 8, attributes, 4, np.random.default_rng(seed))
        own = re.findall(r"T\d", text)
        assert len(set(own)) == 4
        assert text.startswith("This user likes Drama (4), ")
        assert re.findall(r"M(\d) \(1\)", text) == [title[1] for title in own]
        named.update(own)
    assert named == set(titles)


def test_a_variant_rounds_up_and_tells_of_its_own_half_only() -> None:
    texts = {
        statistical_text(["A", "B", "C"], [5.0, 1.0, 1.0], [[], [], []], 4, np.random.default_rng(seed))
        for seed in range(40)
    }
    unliked = {"This user liked none of these: B; C.", "This user liked none of these: C; B."}
    assert texts == {"Liked: A.", *unliked}


LONG = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=40).map(" ".join)


@given(st.lists(st.tuples(LONG, st.lists(LONG, max_size=8)), min_size=1, max_size=40), st.integers(0, 3))
def test_every_text_is_bounded(events: list[tuple[str, list[str]]], seed: int) -> None:
    titles = [title for title, _ in events]
    attributes = [[f"facet: {value}" for value in values] for _, values in events]
    text = statistical_text(
        titles, [5.0] * len(events), attributes, 4, np.random.default_rng(seed) if seed else None
    )
    assert len(text.split()) <= 150
    assert 1 <= len(text.split("Liked: ")[1].split("; ")) <= MAX_TITLES
    named = text.split("Liked: ")[1].removesuffix(".").split("; ")
    assert all(any(title.startswith(name) for title in titles) for name in named)


def test_one_text_is_of_the_whole_history_and_several_are_of_halves() -> None:
    generator = StatisticsGenerator(TITLES, ATTRIBUTES, like_at=4)
    items, stars = [2, 0, 4, 1], [5.0, 4.0, 5.0, 2.0]
    (one,) = generator.generate([items], [stars], [7], [1])[0].samples
    samples = generator.generate([items], [stars], [7], [6])[0].samples
    expected = statistical_text([TITLES[i] for i in items], stars, [ATTRIBUTES[i] for i in items], like_at=4)
    assert (
        one.text
        == expected
        == ("This user likes Comedy (2), 1990s (2), Drama (2), 1980s (1). Liked: Epsilon; Gamma; Alpha.")
    )
    assert len(samples) == 6
    assert len({sample.text for sample in samples}) >= 4
    assert all(sample.text != expected for sample in samples)
    assert all(sample.token_ids == [] and sample.finish_reason == "stop" for sample in samples)


def test_samples_depend_on_the_seed_and_on_nothing_else() -> None:
    generator = StatisticsGenerator(TITLES, ATTRIBUTES, like_at=4)
    alone = generator.generate([[0, 1, 2, 3, 4]], [RATINGS], [7], [5])[0]
    together = generator.generate([[1], [0, 1, 2, 3, 4]], [[3.0], RATINGS], [9, 7], [2, 5])
    assert together[1] == alone
    assert [len(answer.samples) for answer in together] == [2, 5]
    assert generator.generate([[0, 1, 2, 3, 4]], [RATINGS], [8], [5])[0] != alone


def test_catalogue_text_is_cleaned() -> None:
    generator = StatisticsGenerator(['A\n"B" [SEP]'], [["genre: x\ty"]])
    assert (
        generator.generate([[0]], [[1.0]], [0], [1])[0].samples[0].text
        == "This user likes x y (1). Liked: A 'B' SEP."
    )


def test_what_is_typical_stands_out_from_the_catalogue() -> None:
    liked = [["genre: x", "era: y"], ["genre: x"], ["genre: x", "genre: z", "genre: z"], ["genre: x"]]
    shares = {"genre: x": 0.9, "era: y": 0.05, "genre: z": 0.2}
    assert typical_values(liked, shares) == ["y", "x", "z"]  # .25 - .05, 1 - .9, .25 - .2
    assert typical_values(liked, shares, most=1) == ["y"]
    assert typical_values([], shares) == []


def test_the_sentence_of_an_example() -> None:
    assert typical_sentence(["x", "y", "z", "v", "w"], ["A", "B", "C"]) == "x, y, z and v, such as A and B."
    assert typical_sentence(["x"], ["A"]) == "x, such as A."
    assert typical_sentence([], ["A", "B"]) == "A and B."
    assert typical_sentence(["x"], []) == "none of these."
