"""MovieLens as downloaded, every release: 100K, 1M, 10M, and 20M, 25M, latest and latest-small, which share a layout.

The stage prepare decides later which films become candidates, and whether events are ordered by second or by day.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.datasets.files import list_files, read_header
from dpo4rec_ray.datasets.parsing import (
    BAD_NUMBER,
    FIELD_COUNT,
    UNREADABLE,
    parse_events,
    parse_items,
    parsed_lines,
    why_fields,
)
from dpo4rec_ray.datasets.readers import read_csv
from dpo4rec_ray.datasets.source import ITEMS, USERS, DataFile, Parsed, Source
from dpo4rec_ray.errors import UserError

BAD_PROFILE = "bad profile"
MAX_RATING = 5.0
GENDERS = {"F": "a female user", "M": "a male user"}
# 1M writes ages and occupations as the codes of its README; "other or not specified" says nothing.
AGES = {
    "1": "under 18 years old", "18": "18-24 years old", "25": "25-34 years old", "35": "35-44 years old",
    "45": "45-49 years old", "50": "50-55 years old", "56": "56 years old or older",
}  # fmt: skip
_OCCUPATIONS_1M = (
    "", "an academic or educator", "an artist", "in clerical or administrative work",
    "a college or graduate student", "in customer service", "a doctor or in health care",
    "an executive or manager", "a farmer", "a homemaker", "a K-12 student", "a lawyer", "a programmer",
    "retired", "in sales or marketing", "a scientist", "self-employed", "a technician or engineer",
    "a tradesperson or craftsperson", "unemployed", "a writer",
)  # fmt: skip
OCCUPATIONS_1M = {str(code): text for code, text in enumerate(_OCCUPATIONS_1M)}
# 100K writes them out, and ages in years.
OCCUPATIONS_100K = {
    "administrator": "an administrator", "artist": "an artist", "doctor": "a doctor", "educator": "an educator",
    "engineer": "an engineer", "entertainment": "in entertainment", "executive": "an executive",
    "healthcare": "in health care", "homemaker": "a homemaker", "lawyer": "a lawyer", "librarian": "a librarian",
    "marketing": "in marketing", "none": "", "other": "", "programmer": "a programmer", "retired": "retired",
    "salesman": "in sales", "scientist": "a scientist", "student": "a student", "technician": "a technician",
    "writer": "a writer",
}  # fmt: skip
# The flags that end a line of u.item, in their order; "unknown" says nothing.
GENRES = (
    "", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
NO_GENRES = "(no genres listed)"
_COLUMNS = {"user": pa.string(), "item": pa.string(), "rating": pa.float64(), "timestamp_s": pa.int64()}
_DECADE = re.compile(r"\(([0-9]{3})[0-9]\)( \(V\))?\s*$")  # (V): never shown in a cinema
_AGE = re.compile(r"[1-9][0-9]?")

# One line without its end -> a row; raises pyarrow.ArrowInvalid with the reason when it cannot be used.
Read = Callable[[bytes], tuple[Any, ...]]


@dataclass(frozen=True)
class Part:
    """One file of a release: its name, how a block of it is parsed, and the names in its first line, if it has any."""

    name: str
    parse: Callable[[bytes], Parsed]
    header: str = ""


def describe(raw_dir: str) -> Source:
    """The release in a folder, recognised by the names of its files.

    Raises:
        UserError: no release is there, or several are, or a file of it is missing or has another header.
    """
    listed = {file.name: file.path for file in list_files(raw_dir)}
    other = "10M" if "users.dat" in listed else "1M"  # these two share the names of two files
    releases = {name: [part.name for part in parts] for name, parts in _RELEASES.items()}
    fitting = [name for name in releases if name != other and not listed.keys().isdisjoint(releases[name])]
    found = f"found: {', '.join(list(listed)[:20]) or 'no file'}"
    if len(fitting) != 1:
        what = f"files of {len(fitting)} releases" if fitting else "no files"
        wanted = "; ".join(f"{name}: {', '.join(parts)}" for name, parts in releases.items())
        raise UserError(
            f"{raw_dir}: {what} of MovieLens; set data.raw_dir to a folder with those of one ({wanted}); {found}"
        )
    missing = [name for name in releases[fitting[0]] if name not in listed]
    if missing:
        raise UserError(
            f"{raw_dir}: MovieLens {fitting[0]} without {' and '.join(missing)}; unpack it again; {found}"
        )
    ratings, movies, *users = (_data_file(part, listed[part.name]) for part in _RELEASES[fitting[0]])
    return Source((ratings,), (movies,), tuple(users), closed=True)


def _data_file(part: Part, path: str) -> DataFile:
    if part.header:
        found = read_header(path)[:100].decode("utf-8", "backslashreplace")
        if found != part.header:
            raise UserError(f"{path}: the header is {found!r}, not {part.header!r}; unpack it again")
    return DataFile(path, part.parse, header=bool(part.header), complete=True)


def parse_ratings(block: bytes, separator: bytes, lowest: float) -> Parsed:
    """One block of ratings; `lowest` is the fewest stars that can be given."""

    def fast(lines: bytes) -> pa.Table:
        if separator != b",":
            if b"," in lines:
                raise pa.ArrowInvalid("there is a comma in a field")
            lines = lines.replace(separator, b",")
        table = read_csv(lines, _COLUMNS)
        for name in ("user", "item"):
            if not pc.all(pc.ascii_is_decimal(table[name])).as_py():
                raise pa.ArrowInvalid(BAD_NUMBER)
        return table

    def why(line: bytes) -> str:
        reason = why_fields(line, separator, len(_COLUMNS), ((2, False), (3, True)))
        whole = all(field.isdigit() for field in line.split(separator)[:2])
        return reason or ("" if whole else BAD_NUMBER)

    return parse_events(block, fast, why, ratings=(lowest, MAX_RATING))


def parse_movies(block: bytes, read: Read) -> Parsed:
    """One block of movies; `read` makes the row of a line."""
    return parse_items(block, partial(_read_all, read=read, schema=ITEMS), partial(_why, read=read))


def parse_users(block: bytes, read: Read) -> Parsed:
    """One block of users; `read` makes the row of a line."""
    fast, why = partial(_read_all, read=read, schema=USERS), partial(_why, read=read)
    table, origin = parsed_lines(block, fast, why)
    table = table if len(origin.rows) else USERS.empty_table()
    return Parsed(table, origin.rows_read, origin.bad_rows, row_of=origin.rows)


def _read_all(lines: bytes, read: Read, schema: pa.Schema) -> pa.Table:
    rows = [read(line) for line in lines.split(b"\n")[:-1]]
    return pa.table(list(map(list, zip(*rows, strict=True))), schema=schema)


def _why(line: bytes, read: Read) -> str:
    try:
        read(line)
    except pa.ArrowInvalid as error:
        return str(error)
    return ""


def read_movie(line: bytes, separator: str, encoding: str) -> tuple[str, str, list[str]]:
    """A row of ITEMS from a line "id, title, genres"."""
    movie_id, title, genres = _fields(line, separator, encoding, 3)
    return _movie(movie_id, title, [] if genres.strip() == NO_GENRES else genres.split("|"))


def read_movie_100k(line: bytes) -> tuple[str, str, list[str]]:
    """A row of ITEMS from a line of u.item: id, title, two dates, address, and a flag for each genre."""
    movie_id, title, _, _, _, *flags = _fields(line, "|", "latin-1", 5 + len(GENRES))
    if not set(flags) <= {"0", "1"}:
        raise pa.ArrowInvalid(BAD_NUMBER)
    return _movie(movie_id, title, [genre for genre, flag in zip(GENRES, flags, strict=True) if flag == "1"])


def _movie(movie_id: str, title: str, genres: list[str]) -> tuple[str, str, list[str]]:
    """Title and genres as given, and the decade of the year that ends the title."""
    attributes = [f"genre: {genre.strip()}" for genre in genres if genre.strip()]
    decade = _DECADE.search(title)
    return movie_id, title.strip(), [*attributes, f"era: {decade[1]}0s"] if decade else attributes


def read_user_1m(line: bytes) -> tuple[str, str]:
    """A row of USERS from a line of users.dat: id, gender, age, occupation, zip code."""
    user_id, gender, age, occupation, _ = _fields(line, "::", "latin-1", 5)
    return user_id, _profile(GENDERS.get(gender), AGES.get(age), OCCUPATIONS_1M.get(occupation))


def read_user_100k(line: bytes) -> tuple[str, str]:
    """A row of USERS from a line of u.user: id, age, gender, occupation, zip code."""
    user_id, age, gender, occupation, _ = _fields(line, "|", "latin-1", 5)
    years = f"{age} years old" if _AGE.fullmatch(age) else None
    return user_id, _profile(GENDERS.get(gender), years, OCCUPATIONS_100K.get(occupation))


def _profile(*parts: str | None) -> str:
    """The parts that say something. None: the code is not known."""
    if None in parts:
        raise pa.ArrowInvalid(BAD_PROFILE)
    return ", ".join(part for part in parts if part)


def _fields(line: bytes, separator: str, encoding: str, num_fields: int) -> list[str]:
    """The fields of a line; the first is an id, which is a whole number in every release."""
    try:
        text = line.decode(encoding)
        fields = next(csv.reader([text], strict=True)) if separator == "," else text.split(separator)
    except (UnicodeDecodeError, csv.Error):
        raise pa.ArrowInvalid(UNREADABLE) from None
    if len(fields) != num_fields:
        raise pa.ArrowInvalid(FIELD_COUNT)
    if not (fields[0].isascii() and fields[0].isdecimal()):
        raise pa.ArrowInvalid(BAD_NUMBER)
    return fields


def _ratings(separator: bytes, lowest: float) -> Callable[[bytes], Parsed]:
    return partial(parse_ratings, separator=separator, lowest=lowest)


def _movies(separator: str, encoding: str) -> Callable[[bytes], Parsed]:
    return partial(parse_movies, read=partial(read_movie, separator=separator, encoding=encoding))


# Ratings, movies and, in the older releases, users.
_RELEASES: dict[str, tuple[Part, ...]] = {
    "100K": (
        Part("u.data", _ratings(b"\t", 1.0)),
        Part("u.item", partial(parse_movies, read=read_movie_100k)),
        Part("u.user", partial(parse_users, read=read_user_100k)),
    ),
    "1M": (
        Part("ratings.dat", _ratings(b"::", 1.0)),
        Part("movies.dat", _movies("::", "latin-1")),
        Part("users.dat", partial(parse_users, read=read_user_1m)),
    ),
    "10M": (
        Part("ratings.dat", _ratings(b"::", 0.5)),
        Part("movies.dat", _movies("::", "utf-8")),
    ),
    "20M, 25M or latest": (
        Part("ratings.csv", _ratings(b",", 0.5), "userId,movieId,rating,timestamp"),
        Part("movies.csv", _movies(",", "utf-8"), "movieId,title,genres"),
    ),
}
