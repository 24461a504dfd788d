"""What texts name: whole words in any form, titles however they are written, and titles that nobody has."""

from __future__ import annotations

import pytest

from dpo4rec_ray.knowledge.mentions import MentionFinder, PhraseIndex, TitleFinder, ValueFinder, words_of

TITLES = [
    "Toy Story (1995)",
    "Shawshank Redemption, The (1994)",
    "Heat (1995)",
    "Star Wars: Episode IV - A New Hope (1977)",
    "It (1990)",
    "Good, the Bad and the Ugly, The (1966)",
    "Sabrina (1954)",
    "Sabrina (1995)",
]
TOY, SHAWSHANK, HEAT, WARS, IT, GOOD = range(6)


def named(text: str) -> list[str]:
    finder = ValueFinder(
        ["genre: Sci-Fi", "genre: Drama", "genre: Children's", "era: 1990s", "by: Novak", "genre: Comedy"]
    )
    return [finder.names[number] for number in sorted(finder.find(text))]


def test_values_are_whole_words_in_any_case_and_number() -> None:
    assert named("DRAMA, sci-fi!") == ["genre: Drama", "genre: Sci-Fi"]
    assert named("dramas and comedies of the 1990s by Novak's pupil") == [
        "by: Novak",
        "era: 1990s",
        "genre: Comedy",
        "genre: Drama",
    ]
    assert named("melodrama, sci-fi-like, docu-drama, Novakov, 1990") == []
    assert named("films for children") == ["genre: Children's"]


def test_values_that_say_nothing_are_never_named() -> None:
    """Two letters, a common word, and what nearly every item has."""
    attributes = [
        ["kind: Gift Cards", "brand: HP"],
        ["kind: Gift Cards", "brand: Other"],
        ["kind: Gift Cards", "brand: Lego"],
    ]
    assert MentionFinder(["a", "b", "c"], attributes).values == ["brand: Lego"]


def test_the_longest_phrase_wins_and_one_value_may_stand_in_two_facets() -> None:
    index = PhraseIndex([("new",), ("new", "york"), ("york", "city")])
    assert list(index.find(["new", "york", "city", "new"])) == [(0, ("new", "york")), (3, ("new",))]
    finder = ValueFinder(["brand: Sony", "store: Sony"])
    assert finder.find("Sony") == {0, 1}


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("likes Toy Story and more", {(TOY,)}),
        ("likes a toy story", set()),  # running text needs capitals
        ("The Shawshank Redemption", {(SHAWSHANK,)}),
        ("Shawshank Redemption, The (1994)", {(SHAWSHANK,)}),
        ("Heat of the moment; It is so", set()),  # a title of one word needs quotes or a year
        ('loved "Heat" and “It”', {(HEAT,), (IT,)}),
        ("Loved Heat (1995); then it (1990)", {(HEAT,)}),
        ('"Star Wars"', {(WARS,)}),
        ("Star Wars: Episode IV - A New Hope (1977)", {(WARS,)}),
        ('"The Good, the Bad and the Ugly"', {(GOOD,)}),
        ('"Sabrina (1954)"', {(6, 7)}),  # two items share a title
        ('"Toy Story (1995)" (Animation), 5 stars; "Toy Story"', {(TOY,)}),  # each once
    ],
)
def test_titles_of_the_catalogue(text: str, items: set[tuple[int, ...]]) -> None:
    found, invented, _ = TitleFinder(TITLES).find(text)
    assert (found, invented) == (items, set())


@pytest.mark.parametrize(
    ("text", "invented"),
    [
        ('liked "Blade Runner" and "Toy Story"', {"blade runner"}),
        ("liked Blade Runner (1982) and Alien (1979)", {"blade runner", "alien"}),
        ("Great. Alien (1979)", {"alien"}),
        ('called it "a must"; "Drama"; the year (1995)', set()),
        ('said "This user likes long and slow films that end well, above all others."', set()),
        ("Blade Runner (1982). Blade Runner (1982)", {"blade runner"}),
    ],
)
def test_invented_titles(text: str, invented: set[str]) -> None:
    assert TitleFinder(TITLES, {"drama"}).find(text)[1] == invented


def test_words_inside_a_title_are_not_values() -> None:
    finder = MentionFinder(["Horror Show (1990)", "Other"], [["genre: Horror"], ["genre: Drama"]])
    found = finder.find("Liked Horror Show (1990), a drama. Comedy Horror Nights (1991)")
    assert [finder.values[number] for number in found.values] == ["genre: Drama"]
    assert found.titles == ((0,),) and found.invented == 1


def test_long_titles_are_told_by_their_first_words() -> None:
    long = "One Two Three Four Five Six Seven Eight Nine Ten"
    assert TitleFinder([long]).find("has One Two Three Four Five Six Seven Eight in it")[0] == {(0,)}
    assert words_of("R&B o'clock don’t") == ["r&b", "o'clock", "don't"]
