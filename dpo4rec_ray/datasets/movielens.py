"""MovieLens-1M from its raw folder: ratings.dat, movies.dat (latin-1) and users.dat, fields split by `::`.

Departs from KAR's processing, which the paper follows: timestamps stay seconds instead of calendar days, so
that the "first k" events are truly first, and the whole catalogue is kept, rated or not. A damaged file is
refused with the line that is wrong: a truncated download must not pass for a smaller dataset.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from dpo4rec_ray.datasets.raw import RawTables
from dpo4rec_ray.errors import UserError

RATING_FIELDS = ("UserID", "MovieID", "Rating", "Timestamp")
MOVIE_FIELDS = ("MovieID", "Title", "Genres")
USER_FIELDS = ("UserID", "Gender", "Age", "Occupation", "Zip-code")
MIN_RATING, MAX_RATING = 0.5, 5.0
GENDERS = {"F": "a female user", "M": "a male user"}
AGES = {
    "1": "under 18 years old",
    "18": "18-24 years old",
    "25": "25-34 years old",
    "35": "35-44 years old",
    "45": "45-49 years old",
    "50": "50-55 years old",
    "56": "56 years old or older",
}
# The codes of the dataset's README; "other or not specified" says nothing.
OCCUPATIONS = (
    "", "an academic or educator", "an artist", "in clerical or administrative work",
    "a college or graduate student", "in customer service", "a doctor or in health care",
    "an executive or manager", "a farmer", "a homemaker", "a K-12 student", "a lawyer", "a programmer",
    "retired", "in sales or marketing", "a scientist", "self-employed", "a technician or engineer",
    "a tradesperson or craftsperson", "unemployed", "a writer",
)  # fmt: skip
_NUMBER = {True: re.compile(r"-?[0-9]{1,18}"), False: re.compile(r"-?[0-9]+(\.[0-9]*)?")}  # whole or not
_YEAR = re.compile(r"\((\d{3})\d\)\s*$")
_UNPACK = "unpack the dataset again"
_MEND = f"mend that line or {_UNPACK}"


def load(raw_dir: str | Path, *, max_users: int = 0) -> RawTables:
    """Read the folder and keep the first `max_users` users, in file order, that have ratings (0: all).

    Users without ratings are left out and counted in `quarantined`; items nobody rated stay in the catalogue.

    Raises:
        UserError: a missing or truncated file, a line with the wrong fields or a bad number, an id that
            appears twice, or a rating whose user or titled movie is unknown. The message names file, line
            number and line.
    """
    folder = Path(raw_dir)
    movies = _read_lines(folder / "movies.dat", MOVIE_FIELDS)
    users = _read_lines(folder / "users.dat", USER_FIELDS)
    profiles = [_profile(folder / "users.dat", row, fields) for row, fields in enumerate(users)]
    ratings = _read_ratings(folder / "ratings.dat")

    titled = [bool(fields[1].strip()) for fields in movies]
    movie_ids = _ids(folder / "movies.dat", movies)
    item_index = _places(movie_ids, ratings["MovieID"], np.array(titled))
    _refuse_unknown(folder / "ratings.dat", item_index, "the movie id {1} has no title in movies.dat")
    user_index = _places(_ids(folder / "users.dat", users), ratings["UserID"])
    _refuse_unknown(folder / "ratings.dat", user_index, "the user id {0} has no line in users.dat")

    has_ratings = np.bincount(user_index, minlength=len(users)) > 0
    kept = np.flatnonzero(has_ratings)[: max_users or None]
    new_index = np.full(len(users), -1, dtype=np.int64)
    new_index[kept] = np.arange(len(kept))
    events = np.flatnonzero(new_index[user_index] >= 0)

    in_catalogue = np.flatnonzero(titled)
    new_item = np.full(len(movies), -1, dtype=np.int64)
    new_item[in_catalogue] = np.arange(len(in_catalogue))
    return RawTables(
        user_raw_ids=[users[i][0] for i in kept],
        profiles=[profiles[i] for i in kept],
        item_raw_ids=[movies[i][0] for i in in_catalogue],
        titles=[movies[i][1].strip() for i in in_catalogue],
        attributes=[_attributes(movies[i][1], movies[i][2]) for i in in_catalogue],
        user_index=new_index[user_index[events]],
        item_index=new_item[item_index[events]],
        rating=ratings["Rating"][events].astype(np.float32),
        timestamp_s=ratings["Timestamp"][events],
        quarantined={
            "user_without_ratings": int(np.sum(~has_ratings)),
            "movie_without_title": len(movies) - len(in_catalogue),
        },
    )


def _attributes(title: str, genres: str) -> list[str]:
    """Genres as given, and the decade of the year that ends the title."""
    found = [f"genre: {genre.strip()}" for genre in genres.split("|") if genre.strip()]
    year = _YEAR.search(title)
    return [*found, f"era: {year.group(1)}0s"] if year else found


def _profile(path: Path, row: int, fields: Sequence[str]) -> str:
    _, gender, age, occupation, _ = fields
    known_occupation = occupation.isdecimal() and int(occupation) < len(OCCUPATIONS)
    if gender not in GENDERS or age not in AGES or not known_occupation:
        _refuse(path, row, "the gender, age or occupation code is not one of the dataset's README")
    return ", ".join(part for part in (GENDERS[gender], AGES[age], OCCUPATIONS[int(occupation)]) if part)


def _read_bytes(path: Path) -> bytes:
    """The file's content with Unix line ends; the last line must have one, or the file was cut off."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); data.raw_dir must hold ratings.dat, movies.dat and "
            "users.dat of MovieLens-1M"
        ) from None
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n")
    if not data:
        raise UserError(f"{path}: is empty; {_UNPACK}")
    if not data.endswith(b"\n"):
        _refuse(path, data.count(b"\n"), "the file is truncated: it ends within this line", _UNPACK)
    return data


def _read_lines(path: Path, names: Sequence[str]) -> list[list[str]]:
    """The small files, line by line: one list of fields per line."""
    lines = _read_bytes(path).decode("latin-1").removesuffix("\n").split("\n")
    rows = [line.split("::") for line in lines]
    for row, fields in enumerate(rows):
        if len(fields) != len(names):
            _refuse_field_count(path, row, len(fields), names)
    return rows


def _read_ratings(path: Path) -> dict[str, NDArray[np.generic]]:
    """Columns of ratings.dat; row i is line i + 1. No Python object per row unless a line is bad."""
    data = _read_bytes(path)
    types = (pa.int64(), pa.int64(), pa.float64(), pa.int64())
    try:
        if b"\t" in data:
            raise pa.ArrowInvalid("a tab stands in the file")
        table = pyarrow.csv.read_csv(
            pa.BufferReader(data.replace(b"::", b"\t")),
            read_options=pyarrow.csv.ReadOptions(column_names=list(RATING_FIELDS)),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter="\t", quote_char=False, newlines_in_values=False, ignore_empty_lines=False
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict(zip(RATING_FIELDS, types, strict=True)),
                null_values=[],
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        _refuse_first_bad_rating(path, data, str(error))
    columns = {name: table[name].to_numpy() for name in RATING_FIELDS}
    in_range = (columns["Rating"] >= MIN_RATING) & (columns["Rating"] <= MAX_RATING)
    bad = np.flatnonzero(~in_range)  # nan is not in range either
    if len(bad):
        _refuse(path, int(bad[0]), f"the rating is not a number from {MIN_RATING:g} to {MAX_RATING:g}")
    return columns


def _refuse_first_bad_rating(path: Path, data: bytes, reason: str) -> NoReturn:
    """Slow and exact: only run when the fast reader refused the file, to name the line."""
    for row, line in enumerate(data.removesuffix(b"\n").split(b"\n")):
        fields = line.decode("latin-1").split("::")
        if len(fields) != len(RATING_FIELDS):
            _refuse_field_count(path, row, len(fields), RATING_FIELDS)
        for name, value in zip(RATING_FIELDS, fields, strict=True):
            if not _is_number(value, whole=name != "Rating"):
                _refuse(path, row, f"{name} {value!r} is not a number it can hold")
    raise UserError(f"{path}: cannot be read as {'::'.join(RATING_FIELDS)} ({reason}); {_UNPACK}")


def _is_number(text: str, *, whole: bool) -> bool:
    return _NUMBER[whole].fullmatch(text) is not None


def _ids(path: Path, rows: Sequence[Sequence[str]]) -> NDArray[np.int64]:
    """The first field of every line as a number; none may appear twice."""
    seen: dict[int, int] = {}
    for row, fields in enumerate(rows):
        if not _is_number(fields[0], whole=True):
            _refuse(path, row, f"the id {fields[0]!r} is not a whole number")
        first = seen.setdefault(int(fields[0]), row)
        if first != row:
            _refuse(path, row, f"the id {fields[0]} stands in line {first + 1} already")
    return np.fromiter(seen, dtype=np.int64, count=len(seen))


def _places(
    known_ids: NDArray[np.int64], wanted: NDArray[np.generic], usable: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """Place of each wanted id among the known ones, -1 where it is not known or not usable."""
    order = np.argsort(known_ids)
    spot = np.minimum(np.searchsorted(known_ids, wanted, sorter=order), len(known_ids) - 1)
    place = order[spot]
    found = known_ids[place] == wanted
    if usable is not None:
        found &= usable[place]
    return np.where(found, place, -1)


def _refuse_unknown(path: Path, place: NDArray[np.int64], what: str) -> None:
    """Refuse the first rating without a place; `what` may show the line's fields by number."""
    unknown = np.flatnonzero(place < 0)
    if len(unknown):
        row = int(unknown[0])
        others = f" ({len(unknown)} such lines)" if len(unknown) > 1 else ""
        _refuse(path, row, what.format(*_line(path, row).split("::")) + others)


def _refuse_field_count(path: Path, row: int, found: int, names: Sequence[str]) -> NoReturn:
    _refuse(path, row, f"{found} fields where {len(names)} are expected ({'::'.join(names)})")


def _refuse(path: Path, row: int, what: str, advice: str = _MEND) -> NoReturn:
    """Raise the one-line error; reads the file once more, so that only a failing run pays for the text."""
    raise UserError(f"{path} line {row + 1}: {_line(path, row)!r}: {what}; {advice}")


def _line(path: Path, row: int) -> str:
    """Line `row` (from 0) of the file, shortened to what fits a message."""
    text = path.read_bytes().split(b"\n")[row].removesuffix(b"\r").decode("latin-1")
    return text if len(text) <= 100 else text[:100] + "..."
