"""What a text names: attribute values and titles of the catalogue, and titles that the catalogue does not have.

Not in the paper. Counts that need no reranker, so that they say what a text is about even where no reranker reads it.
Matching is by whole words: case and the plural s do not matter, a hyphen belongs to its word ("non-fiction" does not name
"fiction").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

_WORD = re.compile(r"[^\W_]+(?:[-'’&][^\W_]+)*")
_YEAR = re.compile(r"\s*\((?:19|20)\d\d\)")
_QUOTED = re.compile(r'["“”]([^"“”\n]{1,150})["“”]')
_BOUNDS = ';"“”\n\0'  # of these the last one before a year is where the title before it may begin
_HOLE = "\0"  # stands where a title was, so that no phrase is found across it or inside it
_ARTICLES = ("the", "a", "an")
# Values that are one of these words say nothing when a text has them.
_COMMON = (
    "new", "now", "old", "all", "any", "one", "two", "the", "and", "for", "with", "from", "this", "that", "more", "most",
    "many", "some", "other", "others", "general", "various", "misc", "unknown", "none", "n/a", "yes", "not", "user",
    "item", "product", "movie", "film", "book",
)  # fmt: skip
MIN_CHARS = 3  # shorter values are found everywhere
TELLING_SHARE = 0.95  # a value that this share of the items has does not tell users apart
MAX_TITLE_WORDS = 8  # longer titles are told by their first words
_MAX_QUOTED_WORDS = 12  # a longer quotation is no title


class Mentions(NamedTuple):
    """What one text names, each thing once.

    Attributes:
        values: indices into `MentionFinder.values`.
        titles: items of each title that is in the catalogue: several where items share it.
        invented: quoted titles, and names before a year, that the catalogue does not have.
    """

    values: frozenset[int]
    titles: tuple[tuple[int, ...], ...]
    invented: int


class PhraseIndex:
    """Finds phrases in a sequence of words in one pass, the longest at each place, without overlaps."""

    def __init__(self, phrases: Iterable[Sequence[str]]):
        self._phrases = {tuple(words) for words in phrases if words}
        self._lengths: dict[str, list[int]] = {}
        for first, length in sorted({(words[0], len(words)) for words in self._phrases}, reverse=True):
            self._lengths.setdefault(first, []).append(length)

    def find(self, words: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Place and phrase of each find."""
        place = 0
        while place < len(words):
            step = 1
            for length in self._lengths.get(words[place], ()):
                phrase = tuple(words[place : place + length])
                if phrase in self._phrases:
                    yield place, phrase
                    step = length
                    break
            place += step


class ValueFinder:
    """Finds "facet: value" strings in texts by their values. Values that every text has are left out (`is_telling`)."""

    def __init__(self, names: Iterable[str]):
        self.names = sorted({name for name in names if is_telling(name)})
        self._of_phrase: dict[tuple[str, ...], list[int]] = {}
        for number, name in enumerate(self.names):
            self._of_phrase.setdefault(tuple(words_of(name.partition(": ")[2])), []).append(number)
        self._index = PhraseIndex(self._of_phrase)

    def find(self, text: str) -> frozenset[int]:
        """Indices into `names`. A value of several facets names all of them."""
        found: set[int] = set()
        for part in text.split(_HOLE):
            for _, phrase in self._index.find(words_of(part)):
                found.update(self._of_phrase[phrase])
        return frozenset(found)


class TitleFinder:
    """Finds titles of the catalogue in texts, and titles that it does not have.

    A title is found without its year, its article and what follows a colon or bracket. In running text it must have two words
    or more and capitals at both ends; a title of one word ("Heat") counts in quotation marks or with a year behind it.
    """

    def __init__(self, titles: Sequence[str], not_titles: Collection[str] = ()):
        """
        Args:
            titles: per item id.
            not_titles: lower-case words that may stand in quotation marks without being a title.
        """
        items: dict[tuple[str, ...], set[int]] = {}
        for item, title in enumerate(titles):
            bare = _YEAR.sub("", title)
            for name in {bare, re.split(r":\s| \(| - ", bare)[0]}:
                key = _title_key(words_of(name))
                if key:
                    items.setdefault(key, set()).add(item)
        self._items = {key: tuple(sorted(own)) for key, own in items.items()}
        self._index = PhraseIndex(key for key in items if len(key) > 1)
        self._not_titles = frozenset(not_titles)

    def find(self, text: str) -> tuple[set[tuple[int, ...]], set[str], str]:
        """Items of each title that is named, the invented titles, and the text without both."""
        found: set[tuple[int, ...]] = set()
        invented: set[str] = set()
        for step in (self._quoted, self._dated, self._running):
            text = step(text, found, invented)
        return found, invented, text

    def _quoted(self, text: str, found: set[tuple[int, ...]], invented: set[str]) -> str:
        def take(match: re.Match[str]) -> str:
            inner = match[1]
            key = _title_key(words_of(_YEAR.sub("", inner)))
            if key in self._items:
                found.add(self._items[key])
                return _HOLE
            if _YEAR.search(inner):
                return f"{_HOLE}{inner}{_HOLE}"  # `_dated` reads it
            if not _like_a_title(inner) or inner.lower().strip(" .,:;") in self._not_titles:
                return match[0]
            invented.add(" ".join(key))
            return _HOLE

        return _QUOTED.sub(take, text)

    def _dated(self, text: str, found: set[tuple[int, ...]], invented: set[str]) -> str:
        parts, end = [], 0
        for year in _YEAR.finditer(text):
            before = text[end : year.start()]
            begin = 1 + max(before.rfind(mark) for mark in _BOUNDS)
            words = list(_WORD.finditer(before, begin))[-2 * MAX_TITLE_WORDS :]
            keys = [_title_key([_same(word[0]) for word in words[place:]]) for place in range(len(words))]
            known = [
                place
                for place, key in enumerate(keys)
                if key in self._items and not words[place][0][0].islower()
            ]
            first = words[known[0]] if known else None
            if known:
                found.add(self._items[keys[known[0]]])
            elif words and not words[-1][0][0].islower():
                place = len(words) - 1
                while place and _same_name(before, words[place - 1], words[place]):
                    place -= 1
                invented.add(" ".join(keys[place]))
                first = words[place]
            parts.append(f"{before[: first.start()]}{_HOLE}" if first else before)
            end = year.end()
        return "".join([*parts, text[end:]])

    def _running(self, text: str, found: set[tuple[int, ...]], invented: set[str]) -> str:
        parts = []
        for part in text.split(_HOLE):
            words, end = list(_WORD.finditer(part)), 0
            for place, key in self._index.find([_same(word[0]) for word in words]):
                first, last = words[place], words[place + len(key) - 1]
                if first[0][0].islower() or last[0][0].islower():
                    continue
                found.add(self._items[key])
                parts.append(part[end : first.start()])
                end = last.end()
            parts.append(part[end:])
        return _HOLE.join(parts)


class MentionFinder:
    """Reads texts against one catalogue: titles first, then attribute values in what is left."""

    def __init__(self, titles: Sequence[str], attributes: Sequence[Sequence[str]]):
        """titles, attributes ("facet: value" strings): per item_id."""
        counts = Counter(name for row in attributes for name in set(row))
        self._values = ValueFinder(
            name for name, count in counts.items() if count < TELLING_SHARE * len(attributes)
        )
        self._titles = TitleFinder(titles, {name.partition(": ")[2].lower() for name in counts})
        self.values = self._values.names

    def find(self, text: str) -> Mentions:
        """What the text names."""
        titles, invented, rest = self._titles.find(text)
        return Mentions(self._values.find(rest), tuple(sorted(titles)), len(invented))


def words_of(text: str) -> list[str]:
    """The words of a text in the form in which they are compared."""
    return [_same(word) for word in _WORD.findall(text)]


def is_telling(name: str) -> bool:
    """Whether the value of a "facet: value" string is long and rare enough that a text which has it means it."""
    value = name.partition(": ")[2].strip().lower()
    return len(value) >= MIN_CHARS and value not in _COMMON


def _same(word: str) -> str:
    """A word in lower case without possessive and plural."""
    word = word.lower().replace("’", "'").removesuffix("'s")
    if len(word) < 4 or word[-1] != "s" or word[-2] in "su0123456789":
        return word
    return word[:-3] + "y" if word.endswith("ies") and len(word) > 4 else word[:-1]


def _title_key(words: Sequence[str]) -> tuple[str, ...]:
    """What two ways to write a title have in common: without the article, which may stand first or last."""
    kept = list(words)
    if len(kept) > 1 and kept[0] in _ARTICLES:
        kept = kept[1:]
    elif len(kept) > 1 and kept[-1] in _ARTICLES:
        kept = kept[:-1]
    return tuple(kept[:MAX_TITLE_WORDS])


def _same_name(text: str, word: re.Match[str], following: re.Match[str]) -> bool:
    """Whether a word may belong to the name that goes on with the following one: capitals, and no sentence ends between."""
    between = text[word.end() : following.start()]
    return not word[0][0].islower() and not (len(word[0]) > 3 and re.search(r"[.!?:]", between))


def _like_a_title(quoted: str) -> bool:
    """Whether a quotation begins as a title does and is no sentence."""
    words = _WORD.findall(quoted)
    return (
        0 < len(words) <= _MAX_QUOTED_WORDS
        and not words[0][0].islower()
        and not quoted.rstrip().endswith((".", ",", ":"))
    )
