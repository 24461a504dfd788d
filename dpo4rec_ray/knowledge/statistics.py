"""Knowledge texts counted from a user's history: the baseline for every LLM's texts (llm.source = "statistics").

Not in the paper. The text names the most frequent attributes of what the user liked, with counts, and the liked titles.
The form was chosen on MovieLens-1M. Later lists of a user were ranked by the cosine of text and item vectors, with the
user's own text and with another user's text; the difference in NDCG@5 (450 users, standard error .007) was .076 for five
values and 15 titles, .063 for titles alone, and .067 with facets named and counted apart. Five disliked titles cost .009:
a mean over tokens does not know that they were disliked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from dpo4rec_ray.knowledge.completions import Answer, Completion
from dpo4rec_ray.knowledge.prompts import clean_attribute, clean_text, likes

STATISTICS_VERSION = 1  # raise it with any change of wording: texts of two versions are not comparable
MAX_VALUES = 5  # attribute values named
MAX_TITLES = 15
TYPICAL_VALUES = 5  # that a prompt names
EXAMPLE_VALUES, EXAMPLE_TITLES = 4, 2  # of the sentence that an example in a prompt answers
# For catalogues with long names. A text has at most 150 words; an encoder that reads 256 tokens sees about 120 of them.
MAX_NAME_WORDS = 12
MAX_TITLES_WORDS = 80


def statistical_text(
    titles: Sequence[str],
    ratings: Sequence[float],
    attributes: Sequence[Sequence[str]],
    like_at: float | None,
    rng: np.random.Generator | None = None,
) -> str:
    """A text about one user: 'This user likes Drama (12), 1990s (9). Liked: Heat (1995); Fargo (1996).'

    Args:
        titles: of the n events of the knowledge history in time order; clean (`clean_text`).
        ratings: [n].
        attributes: "facet: value" strings per event, of which the values are shown. A count is the number of liked
            events that have the attribute.
        like_at: the least rating of a liked event. None: implicit feedback, everything is liked.
        rng: None: the whole history is counted, and titles stand by rating, equal ones by time, newest first. With a
            generator: a random half of the events, rounded up, in random order.

    Raises:
        ValueError: the lengths differ.
    """
    if not len(titles) == len(ratings) == len(attributes):
        raise ValueError(
            f"{len(titles)} titles, {len(ratings)} ratings, {len(attributes)} rows of attributes: not one per event"
        )
    if not titles:
        return "Nothing is known about this user's tastes."
    if rng is not None:
        events = rng.permutation(len(titles))[: (len(titles) + 1) // 2].tolist()
    elif like_at is None:
        events = list(range(len(titles)))[::-1]
    else:
        events = sorted(range(len(titles)), key=lambda i: (-ratings[i], -i))
    liked = [i for i in events if likes(ratings[i], like_at)]
    if not liked:
        return f"This user liked none of these: {_listed([titles[i] for i in events])}."
    counts = Counter(attribute for i in liked for attribute in dict.fromkeys(attributes[i]))
    top = [f"{_cut(name.partition(': ')[2])} ({count})" for name, count in counts.most_common(MAX_VALUES)]
    opening = f"This user likes {', '.join(top)}. " if top else ""
    return f"{opening}Liked: {_listed([titles[i] for i in liked])}."


def typical_values(
    liked: Sequence[Sequence[str]], shares: Mapping[str, float], most: int = TYPICAL_VALUES
) -> list[str]:
    """The attributes that tell a user from others: those whose share of the liked items exceeds their share of the catalogue
    most, without their facets; ties in the order of the names.

    Beside the most frequent ones, which are Drama and Comedy for nearly everybody, they fit later likes better (MovieLens-1M,
    80 users, 5 values, genres' share of later likes above average): .074 against .050, standard error .012.

    liked: "facet: value" strings per liked item; shares: of the catalogue's items that have an attribute.
    """
    counts = Counter(value for values in liked for value in dict.fromkeys(values))
    above = {value: count / len(liked) - shares[value] for value, count in counts.items()}
    return [
        _cut(value.partition(": ")[2]) for value in sorted(above, key=lambda one: (-above[one], one))[:most]
    ]


def typical_sentence(typical: Sequence[str], titles: Sequence[str]) -> str:
    """How 'This user likes' goes on in an example: 'Comedy, 1970s and War, such as Duck Soup (1933) and M*A*S*H (1970).'

    typical: from `typical_values`; titles: of liked items, the best first. Who liked nothing likes 'none of these'.
    """
    values, named = typical[:EXAMPLE_VALUES], [_cut(title) for title in titles[:EXAMPLE_TITLES]]
    if not named:
        return "none of these."
    return f"{_and(values)}, such as {_and(named)}." if values else f"{_and(named)}."


class StatisticsGenerator:
    """Takes the place of an engine, but writes from histories instead of prompts. Holds the whole catalogue."""

    def __init__(
        self, titles: Sequence[str], attributes: Sequence[Sequence[str]], like_at: float | None = None
    ):
        """titles, attributes: per item_id, as the dataset has them; like_at: as in `statistical_text`."""
        self._titles = [clean_text(title, ()) for title in titles]
        self._attributes = [[clean_attribute(value, ()) for value in row] for row in attributes]
        self._like_at = like_at

    def generate(
        self,
        item_ids: Sequence[Sequence[int]],
        ratings: Sequence[Sequence[float]],
        seeds: Sequence[int],
        num_samples: Sequence[int],
        *,
        whole_first: bool = False,
    ) -> list[Answer]:
        """Texts of B users. A single text counts the whole history; each of several texts counts a random half, but with
        `whole_first` the first one counts the whole history too.

        item_ids, ratings: each user's knowledge history in time order; seeds, num_samples: one per user. The samples have
        no token ids: nothing is trained on these texts.
        """
        answers: list[Answer] = []
        for items, stars, seed, count in zip(item_ids, ratings, seeds, num_samples, strict=True):
            titles, attributes = [self._titles[i] for i in items], [self._attributes[i] for i in items]
            rng = np.random.default_rng(seed)
            num_whole = 1 if whole_first or count == 1 else 0
            texts = [
                statistical_text(titles, stars, attributes, self._like_at, None if n < num_whole else rng)
                for n in range(count)
            ]
            answers.append(Answer([Completion([], text, "stop") for text in texts]))
        return answers


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1])] * (len(words) > 1) + [words[-1]])


def _cut(name: str) -> str:
    return " ".join(name.split()[:MAX_NAME_WORDS])


def _listed(titles: Sequence[str]) -> str:
    """The first titles, as many as MAX_TITLES and MAX_TITLES_WORDS allow."""
    named: list[str] = []
    room = MAX_TITLES_WORDS
    for title in map(_cut, titles[:MAX_TITLES]):
        room -= len(title.split())
        if room < 0:
            break
        named.append(title)
    return "; ".join(named)
