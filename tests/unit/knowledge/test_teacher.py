"""The template teacher: it reads the history only, its opening words tell the kind, and the truth measures its texts."""

from __future__ import annotations

import numpy as np
import pytest

from dpo4rec_ray.knowledge.mentions import ValueFinder
from dpo4rec_ray.knowledge.teacher import (
    DEFAULT_MIX,
    EVERY_FACET,
    OPENINGS,
    popular_values,
    teacher_text,
    text_accuracy,
)

HISTORY = [
    ["genre: drama", "era: 1980s", "creator: Okafor"],
    ["genre: drama", "era: 1980s", "creator: Novak"],
    ["genre: horror", "era: 1990s", "creator: Tanaka"],
    ["genre: comedy", "era: 1980s", "creator: Okafor"],
]
RATINGS = [5.0, 4.0, 1.0, 5.0]
POPULAR = popular_values(HISTORY)


def _text(
    kind: str, seed: int = 0, history: list[list[str]] = HISTORY, ratings: list[float] = RATINGS
) -> str:
    return teacher_text(history, ratings, popular_values(history), np.random.default_rng(seed), {kind: 1.0})


def test_attentive_text_worked_by_hand():
    """drama (5 - 2.5) + (4 - 2.5) = 4, comedy 2.5, horror -1.5; 1980s 6.5; Okafor 5, Novak 1.5."""
    assert _text("attentive") == (
        "Judging by the ratings: enjoys drama and comedy, films of the 1980s, by Okafor and Novak."
    )


def test_a_hasty_text_names_only_what_is_in_the_history_and_a_generic_one_ignores_it():
    finder = ValueFinder(a for item in HISTORY for a in item)
    vocabulary = finder.names
    for seed in range(20):
        picked = {vocabulary[number] for number in finder.find(_text("hasty", seed))}
        assert any(picked <= {*one, *two} for one in HISTORY for two in HISTORY)
    rng = lambda: np.random.default_rng(5)  # noqa: E731
    popular = {"genre": ["western", "mystery"], "era": ["1970s"], "creator": ["Varga"]}
    one = teacher_text(HISTORY, RATINGS, popular, rng(), {"generic": 1.0})
    two = teacher_text(HISTORY[:1], [1.0], popular, rng(), {"generic": 1.0})
    assert one == two and one.startswith(OPENINGS["generic"])


def test_the_wording_tells_the_kind_and_the_mix_is_kept():
    rng = np.random.default_rng(0)
    texts = [teacher_text(HISTORY, RATINGS, POPULAR, rng) for _ in range(2000)]
    assert all(text.startswith(tuple(OPENINGS.values())) for text in texts)
    for kind, share in DEFAULT_MIX.items():
        found = np.mean([text.startswith(OPENINGS[kind]) for text in texts])
        assert abs(found - share / sum(DEFAULT_MIX.values())) < 0.04


def test_texts_work_with_facets_missing_and_are_deterministic():
    history = [["genre: Sci-Fi", "genre: Children's", "era: 1990s"], ["genre: Drama"]]
    for kind in OPENINGS:
        text = _text(kind, 1, history, [5.0, 2.0])
        assert text == _text(kind, 1, history, [5.0, 2.0]) and "by " not in text.removeprefix(OPENINGS[kind])
    with pytest.raises(ValueError, match="at least one event"):
        teacher_text([], [], POPULAR, np.random.default_rng(0))


def test_text_accuracy_worked_by_hand():
    """User 0 loves drama, users 1 and 2 love comedy and horror.

    Texts name: user 0 drama and comedy (1 of 2 true; the others' truths hold 1 of 2 mentions twice: drama
    in 0 of 2, comedy in 1 of 2); user 1 comedy (true; 0 of 2 others); user 2 drama (false; 1 of 2 others).
    Accuracy 2 / 4; chance (0 + 0.5 + 0 + 0.5) / 4; corrected (0.5 - 0.25) / (1 - 0.25).
    """
    truth = [["genre: drama"], ["genre: comedy"], ["genre: horror"]]
    texts = [["enjoys drama and comedy"], ["enjoys comedy"], ["enjoys drama"]]
    found = text_accuracy(texts, truth)
    assert list(found) == [EVERY_FACET, "genre"]
    assert found["genre"][:2] == pytest.approx((0.5, 0.25))
    assert found["genre"].corrected.mean == pytest.approx(1 / 3)
    nothing = text_accuracy([[""], [], ["nothing"]], truth)[EVERY_FACET]
    assert nothing[:2] == (0.0, 0.0) and np.isnan(nothing.corrected.mean)
    with pytest.raises(ValueError, match="two or more"):
        text_accuracy([["a"]], [["genre: drama"]])


def test_a_facet_on_which_all_agree_is_no_credit():
    """All love the 1980s: naming it is always true, and chance is 1. Genres differ: the truth is 1 beyond chance."""
    truth = [["genre: drama", "era: 1980s"], ["genre: comedy", "era: 1980s"]] * 5
    texts = [["drama of the 1980s"], ["comedy of the 1980s"]] * 5
    found = text_accuracy(texts, truth)
    assert found["era"][:2] == (1.0, 1.0) and np.isnan(found["era"].corrected.mean)
    genre = found["genre"]
    assert (genre.accuracy, genre.corrected.mean) == (1.0, 1.0) and genre.chance == pytest.approx(4 / 9)
    everybody = text_accuracy([["drama of the 1980s"]] * 10, truth)["genre"]
    assert everybody.accuracy == 0.5 and everybody.corrected.mean == pytest.approx(0.0)
    assert everybody.corrected.low <= 0 <= everybody.corrected.high


def test_any_facet_can_be_taught():
    """Catalogues of news have categories; the LLM that is trained on such texts has something to name."""
    items = [["category: sports", "subcategory: golf"]] * 3 + [["category: news", "subcategory: local"]]
    popular = popular_values(items)
    texts = [
        teacher_text(items, [5.0, 5.0, 4.0, 1.0], popular, np.random.default_rng(seed)) for seed in range(40)
    ]
    assert any("category sports" in text and "subcategory golf" in text for text in texts)
    assert all("category" in text for text in texts)
