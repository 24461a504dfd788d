"""The sample world: a deterministic synthetic catalogue and users whose true tastes are known.

Not in the paper. With it `make demo` needs no download, and the first question about a reward can be answered: do the
knowledge texts name what a user truly loves? A user loves a few values of each facet. Taste and popularity decide which
items the user meets; taste, item quality and noise decide the stars.

`simulate_users` takes any catalogue given as attributes, so the small LLM for another catalogue (MovieLens: genre and era
only) can be trained on simulated users too. These training users come from the random stream "bootstrap", a run's users
from the stream "run", so the two never meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpo4rec_ray.config.data import SampleSection
from dpo4rec_ray.datasets.source import EVENTS, ITEMS, DataFile, Source
from dpo4rec_ray.errors import UserError

GENRES = ("drama", "comedy", "thriller", "romance", "horror", "western", "mystery", "fantasy")
ERAS = ("1970s", "1980s", "1990s", "2000s", "2010s")
CREATORS = (
    "Okafor", "Lindqvist", "Marchetti", "Tanaka", "Delgado", "Novak", "Haddad", "Sorensen",
    "Varga", "Mbeki", "Castellan", "Petrov", "Ashdown", "Ferreira",
)  # fmt: skip
FIRST_WORDS = (
    "Silent", "Golden", "Broken", "Hidden", "Crimson", "Endless", "Hollow", "Distant", "Burning", "Frozen",
    "Gentle", "Restless", "Velvet", "Iron", "Paper", "Borrowed", "Electric", "Northern", "Second", "Winter",
    "Midnight", "Forgotten", "Savage", "Copper", "Painted",
)  # fmt: skip
LAST_WORDS = (
    "Harbor", "Garden", "Mirror", "River", "Letter", "Station", "Orchard", "Lantern", "Kingdom", "Bridge",
    "Summer", "Witness", "Promise", "Voyage", "Shadow", "Castle", "Verdict", "Melody", "Horizon", "Stranger",
    "Meadow", "Signal", "Tower", "Carnival", "Compass",
)  # fmt: skip
# Share of a facet's values that a user loves: at least one value and at most MAX_LOVED.
LOVED_SHARE, MAX_LOVED = 0.25, 2
# Log-odds of meeting an item, per facet of it that the user loves; exponent of its popularity in the same odds.
TASTE_STRENGTH, POPULARITY_STRENGTH = 1.8, 0.5
# Stars are base + per_match * (loved facets of the item) + quality * (its quality) + noise * N(0, 1), rounded and clipped.
STARS_BASE, STARS_PER_MATCH, STARS_QUALITY, STARS_NOISE = 2.2, 1.0, 0.3, 0.4
# Events per user, both ends included.
MIN_EVENTS, MAX_EVENTS = 24, 36
# Random streams: the second word of every seed sequence, so that equal seeds give other draws in other streams.
STREAMS = {"run": 1, "bootstrap": 2}
_CATALOGUE_STREAM = 3
# 2001-09-09; any fixed time would do.
_FIRST_EVENT_S = 1_000_000_000
# Bounds the size of the [users, items] arrays.
_USERS_PER_BLOCK = 256


@dataclass(frozen=True)
class SampleCatalogue:
    """titles and attributes per item; popularity [I] sums to 1 (Zipf), quality [I] is standard normal."""

    titles: list[str]
    attributes: list[list[str]]
    popularity: NDArray[np.float64]
    quality: NDArray[np.float64]


@dataclass(frozen=True)
class SimulatedUsers:
    """tastes per user ("facet: value"); events by user, then time: index, index, stars, seconds, each [n]."""

    tastes: list[list[str]]
    user_index: NDArray[np.int64]
    item_index: NDArray[np.int64]
    rating: NDArray[np.float32]
    timestamp_s: NDArray[np.int64]


def make_catalogue(num_items: int, seed: int) -> SampleCatalogue:
    """Distinct titles of two words, attributes (one genre, era and creator per item), popularity and quality.

    Raises:
        UserError: num_items below 20 (no list of ten could be filled) or above the number of distinct titles.
    """
    most = len(FIRST_WORDS) * len(LAST_WORDS)
    if not 20 <= num_items <= most:
        raise UserError(f"sample world: num_items = {num_items}; it must be 20 to {most}")
    rng = np.random.default_rng([seed, _CATALOGUE_STREAM])
    pairs = rng.permutation(most)[:num_items]
    titles = [f"{FIRST_WORDS[p // len(LAST_WORDS)]} {LAST_WORDS[p % len(LAST_WORDS)]}" for p in pairs]
    # A shuffled round-robin makes all values about equally frequent: else a text could name frequent ones and be right.
    columns = [
        [f"{facet}: {values[i % len(values)]}" for i in rng.permutation(num_items)]
        for facet, values in (("genre", GENRES), ("era", ERAS), ("creator", CREATORS))
    ]
    popularity = 1.0 / (1.0 + rng.permutation(num_items))
    return SampleCatalogue(
        titles=titles,
        attributes=[list(values) for values in zip(*columns, strict=True)],
        popularity=popularity / popularity.sum(),
        quality=rng.standard_normal(num_items),
    )


def facet_values(attributes: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Facet -> its distinct "facet: value" strings, most frequent first, ties by name."""
    counts: dict[str, dict[str, int]] = {}
    for item in attributes:
        for attribute in item:
            facet = counts.setdefault(attribute.split(": ", 1)[0], {})
            facet[attribute] = facet.get(attribute, 0) + 1
    return {f: sorted(values, key=lambda v, c=values: (-c[v], v)) for f, values in counts.items()}


def simulate_users(
    attributes: Sequence[Sequence[str]],
    popularity: NDArray[np.float64],
    num_users: int,
    seed: int,
    *,
    stream: str = "run",
    quality: NDArray[np.float64] | None = None,
) -> SimulatedUsers:
    """Users with tastes over the facets of `attributes` ("facet: value" strings per item), and what they rated.

    Items are drawn without replacement with odds popularity^p * exp(taste * matches) by Gumbel top-n, which is the same
    as drawing one after the other. popularity, quality: [I]. The same arguments give the same users.

    Raises:
        UserError: an unknown stream, or a catalogue with fewer items than one user's events.
    """
    if stream not in STREAMS:
        raise UserError(f"sample world: stream {stream!r} is unknown; known: {', '.join(STREAMS)}")
    num_items = len(attributes)
    if num_items < MAX_EVENTS:
        raise UserError(f"sample world: {num_items} items are too few for {MAX_EVENTS} events per user")
    rng = np.random.default_rng([seed, STREAMS[stream]])
    quality = np.zeros(num_items) if quality is None else quality
    facets = facet_values(attributes)
    names = [value for values in facets.values() for value in values]
    column = {name: i for i, name in enumerate(names)}
    has = np.zeros((num_items, len(names)), dtype=np.float32)
    for i, item in enumerate(attributes):
        has[i, [column[a] for a in item]] = 1.0
    appeal = POPULARITY_STRENGTH * np.log(np.maximum(popularity, 1e-12))

    tastes: list[list[str]] = []
    parts: list[tuple[NDArray, ...]] = []
    for start in range(0, num_users, _USERS_PER_BLOCK):
        block = min(_USERS_PER_BLOCK, num_users - start)
        loves = _draw_tastes(rng, block, facets, has)
        # One match per facet, however many of an item's values (genres) are loved.
        matches = np.zeros((block, num_items), dtype=np.float64)
        for values in facets.values():
            columns = [column[v] for v in values]
            matches += (loves[:, columns] @ has[:, columns].T) > 0
        odds = appeal + TASTE_STRENGTH * matches + rng.gumbel(size=(block, num_items))
        items = np.argsort(-odds, axis=1, kind="stable")[:, :MAX_EVENTS]
        stars = (
            STARS_BASE
            + STARS_PER_MATCH * np.take_along_axis(matches, items, axis=1)
            + STARS_QUALITY * quality[items]
            + STARS_NOISE * rng.standard_normal(items.shape)
        )
        times = _FIRST_EVENT_S + np.cumsum(rng.integers(3600, 7 * 86400, size=items.shape), axis=1)
        lengths = rng.integers(MIN_EVENTS, MAX_EVENTS + 1, size=block)
        keep = np.arange(MAX_EVENTS)[None, :] < lengths[:, None]
        users = np.broadcast_to(np.arange(start, start + block)[:, None], items.shape)
        parts.append((users[keep], items[keep], np.clip(np.rint(stars), 1, 5)[keep], times[keep]))
        tastes += [[names[c] for c in np.flatnonzero(row)] for row in loves]
    user, item, rating, time = (np.concatenate(column) for column in zip(*parts, strict=True))
    return SimulatedUsers(
        tastes, user.astype(np.int64), item.astype(np.int64), rating.astype(np.float32), time.astype(np.int64)
    )


def _draw_tastes(
    rng: np.random.Generator,
    num_users: int,
    facets: dict[str, list[str]],
    has: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Loved values [num_users, V] as 0/1, drawn per facet without replacement with odds sqrt(frequency).

    has: [I, V], its columns in the order of `facets`.
    """
    loves = np.zeros((num_users, has.shape[1]), dtype=np.float32)
    frequency = has.sum(axis=0)
    first = 0
    for values in facets.values():
        number = int(np.clip(round(LOVED_SHARE * len(values)), 1, MAX_LOVED))
        keys = 0.5 * np.log(frequency[first : first + len(values)]) + rng.gumbel(
            size=(num_users, len(values))
        )
        loved = first + np.argsort(-keys, axis=1, kind="stable")[:, :number]
        np.put_along_axis(loves, loved, 1.0, axis=1)
        first += len(values)
    return loves


def describe(section: SampleSection, seed: int) -> Source:
    """The sample world's users (drawn from `seed`) over its fixed catalogue, in memory, with their true tastes."""
    catalogue = make_catalogue(section.num_items, section.catalogue_seed)
    users = simulate_users(
        catalogue.attributes,
        catalogue.popularity,
        section.num_users,
        seed,
        quality=catalogue.quality,
    )
    user_ids = pa.array([f"u{i}" for i in range(section.num_users)])
    item_ids = pa.array([f"i{i}" for i in range(section.num_items)])
    events = pa.table(
        {
            "user": user_ids.take(pa.array(users.user_index)),
            "item": item_ids.take(pa.array(users.item_index)),
            "rating": users.rating,
            "timestamp_s": users.timestamp_s,
        }
    )
    items = pa.table({"raw_id": item_ids, "title": catalogue.titles, "attributes": catalogue.attributes})
    return Source(
        events=(DataFile("the sample world", kind="memory", table=events.cast(EVENTS)),),
        items=(DataFile("the sample world", kind="memory", table=items.cast(ITEMS)),),
        truth=pa.table({"raw_id": user_ids, "tastes": users.tastes}),
    )
