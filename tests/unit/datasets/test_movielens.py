"""MovieLens reader: the columns of a tiny folder, every refused damage, and the real files."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from dpo4rec_ray.datasets import DATASETS, load_raw
from dpo4rec_ray.errors import UserError

REAL = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "ml-1m"
MOVIES = (
    b"1::Toy Story (1995)::Animation|Children's|Comedy\n"
    b"2::Les Mis\xe9rables (1958)::Drama\n"  # latin-1
    b"10::Untitled Thing::Sci-Fi\n"
)
USERS = b"1::F::1::10::48067\n2::M::56::0::70072\n3::M::25::12::55117\n"
RATINGS = b"3::2::4::978300760\n1::10::5::978302109\n3::1::1::978301968\n"


@pytest.fixture
def raw_dir(tmp_path: Path) -> Path:
    for name, data in {"movies.dat": MOVIES, "users.dat": USERS, "ratings.dat": RATINGS}.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_columns_of_a_tiny_folder(raw_dir: Path) -> None:
    raw = load_raw("movielens", raw_dir)
    assert raw.user_raw_ids == ["1", "3"]  # user 2 rated nothing
    assert raw.profiles == [
        "a female user, under 18 years old, a K-12 student",
        "a male user, 25-34 years old, a programmer",
    ]
    assert raw.item_raw_ids == ["1", "2", "10"]
    assert raw.titles == ["Toy Story (1995)", "Les Misérables (1958)", "Untitled Thing"]
    assert raw.attributes == [
        ["genre: Animation", "genre: Children's", "genre: Comedy", "era: 1990s"],
        ["genre: Drama", "era: 1950s"],
        ["genre: Sci-Fi"],  # no year, no era
    ]
    # events keep file order
    assert raw.user_index.tolist() == [1, 0, 1]
    assert raw.item_index.tolist() == [1, 2, 0]
    assert raw.rating.tolist() == [4.0, 5.0, 1.0]
    assert raw.timestamp_s.tolist() == [978300760, 978302109, 978301968]
    assert (raw.rating.dtype, raw.timestamp_s.dtype, raw.user_index.dtype) == (np.float32, np.int64, np.int64)
    assert raw.truth is None
    assert raw.quarantined == {"user_without_ratings": 1, "movie_without_title": 0}


def test_unspecified_occupation_is_left_out_of_the_profile(raw_dir: Path) -> None:
    (raw_dir / "ratings.dat").write_bytes(b"2::1::5::978300760\n")
    assert load_raw("movielens", raw_dir).profiles == ["a male user, 56 years old or older"]


def test_max_users_takes_the_first_with_ratings_and_keeps_the_catalogue(raw_dir: Path) -> None:
    raw = load_raw("movielens", raw_dir, max_users=1)
    assert raw.user_raw_ids == ["1"]
    assert len(raw.titles) == 3
    assert (raw.user_index.tolist(), raw.item_index.tolist()) == ([0], [2])


def test_an_unrated_movie_without_title_leaves_the_catalogue(raw_dir: Path) -> None:
    (raw_dir / "movies.dat").write_bytes(b"7::::Drama\n" + MOVIES)
    raw = load_raw("movielens", raw_dir)
    assert raw.item_raw_ids == ["1", "2", "10"]
    assert raw.item_index.tolist() == [1, 2, 0]
    assert raw.quarantined["movie_without_title"] == 1


def test_windows_line_ends_and_half_stars_are_read(raw_dir: Path) -> None:
    (raw_dir / "ratings.dat").write_bytes(b"3::2::4.5::978300760\r\n1::10::5::978302109\r\n")
    raw = load_raw("movielens", raw_dir)
    assert raw.rating.tolist() == [4.5, 5.0]


@pytest.mark.parametrize("name", ["ratings.dat", "movies.dat", "users.dat"])
def test_a_missing_file_is_named(raw_dir: Path, name: str) -> None:
    (raw_dir / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: cannot be read \(No such file.*data\.raw_dir must hold"):
        load_raw("movielens", raw_dir)


@pytest.mark.parametrize(
    ("name", "data", "line", "reason"),
    [
        ("ratings.dat", RATINGS[:-1], 3, "truncated"),  # all fields there, but is 978301968 the whole number?
        ("ratings.dat", RATINGS[:-14], 3, "truncated"),
        ("ratings.dat", RATINGS + b"1::2::3\n", 4, "3 fields where 4 are expected"),
        ("ratings.dat", RATINGS + b"1::2::3::4::5\n", 4, "5 fields where 4 are expected"),
        ("ratings.dat", b"1::2::3::\n" + RATINGS, 1, "Timestamp '' is not a number"),
        ("ratings.dat", RATINGS + b"\n", 4, "1 fields where 4 are expected"),
        ("ratings.dat", RATINGS + b"1\t2::3::4\n", 4, "3 fields where 4 are expected"),
        ("ratings.dat", RATINGS + b"1::2::x::978300760\n", 4, "Rating 'x' is not a number"),
        ("ratings.dat", RATINGS + b"1::2.5::3::978300760\n", 4, "MovieID '2.5' is not a number"),
        ("ratings.dat", RATINGS + b"1::2::3::" + b"9" * 30 + b"\n", 4, "is not a number it can hold"),
        ("ratings.dat", RATINGS + b"1::2::nan::978300760\n", 4, "not a number from 0.5 to 5"),
        ("ratings.dat", RATINGS + b"1::2::50::978300760\n", 4, "not a number from 0.5 to 5"),
        ("ratings.dat", RATINGS + b"1::77::5::978300760\n", 4, "the movie id 77 has no title in movies.dat"),
        ("ratings.dat", b"9::1::5::978300760\n" + RATINGS, 1, "the user id 9 has no line in users.dat"),
        ("movies.dat", MOVIES[:-1], 3, "truncated"),
        ("movies.dat", MOVIES + b"11::No genres\n", 4, "2 fields where 3 are expected"),
        ("movies.dat", MOVIES + b"x::Title::Drama\n", 4, "the id 'x' is not a whole number"),
        ("movies.dat", MOVIES + b"2::Again::Drama\n", 4, "the id 2 stands in line 2 already"),
        ("users.dat", USERS + b"4::M::25::12\n", 4, "4 fields where 5 are expected"),
        ("users.dat", USERS + b"4::M::26::12::1\n", 4, "code is not one of the dataset's README"),
        ("users.dat", USERS + b"4::M::25::99::1\n", 4, "code is not one of the dataset's README"),
    ],
)
def test_damage_is_refused_with_file_and_line(
    raw_dir: Path, name: str, data: bytes, line: int, reason: str
) -> None:
    (raw_dir / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_raw("movielens", raw_dir)
    message = str(caught.value)
    assert f"{name} line {line}: " in message
    assert reason in message
    assert "\n" not in message
    assert "unpack the dataset again" in message


def test_an_empty_title_counts_as_none(raw_dir: Path) -> None:
    (raw_dir / "movies.dat").write_bytes(MOVIES.replace(b"Toy Story (1995)", b" "))
    with pytest.raises(UserError, match=r"ratings\.dat line 3: .*the movie id 1 has no title in movies\.dat"):
        load_raw("movielens", raw_dir)


@pytest.mark.parametrize("name", ["ratings.dat", "movies.dat", "users.dat"])
def test_an_empty_file_is_refused(raw_dir: Path, name: str) -> None:
    (raw_dir / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}: is empty"):
        load_raw("movielens", raw_dir)


def test_an_unknown_dataset_names_the_known_ones(raw_dir: Path) -> None:
    with pytest.raises(UserError, match=f"'movelens' is unknown; known: {', '.join(DATASETS)}"):
        load_raw("movelens", raw_dir)


@pytest.mark.skipif(
    not (REAL / "ratings.dat").is_file(), reason="MovieLens-1M is not at ../shared/data/ml-1m"
)
def test_the_real_folder() -> None:
    load_raw("movielens", REAL, max_users=1)  # pyarrow's first use costs a second of imports
    start = time.process_time()
    raw = load_raw("movielens", REAL)
    assert time.process_time() - start < 2.0  # CPU seconds: the machine may be busy
    assert (len(raw.user_raw_ids), len(raw.rating)) == (2999, 487_650)
    assert len(raw.titles) == 3883
    assert len(np.unique(raw.item_index)) == 3615
    assert set(np.unique(raw.rating)) == {1.0, 2.0, 3.0, 4.0, 5.0}
    few = load_raw("movielens", REAL, max_users=400)
    assert few.user_raw_ids == raw.user_raw_ids[:400]
    assert len(few.titles) == 3883
    first = raw.user_index < 400
    np.testing.assert_array_equal(few.item_index, raw.item_index[first])
    np.testing.assert_array_equal(few.timestamp_s, raw.timestamp_s[first])
