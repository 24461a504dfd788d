"""MovieLens: tiny folders of every release, what is wrong with a folder or a line, random damage, and the real files."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_ray.datasets.files import plan_splits, read_blocks
from dpo4rec_ray.datasets.movielens import describe, read_movie, read_movie_100k, read_user_1m, read_user_100k
from dpo4rec_ray.datasets.source import EVENTS, ITEMS, USERS, DataFile, Parsed
from dpo4rec_ray.errors import UserError

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "ml-1m"
FOLDERS = {
    "100K": {
        "u.data": b"196\t242\t3\t881250949\n186\t302\t1\t891717742\n196\t267\t5\t878887116\n",
        "u.item": (
            b"242|Kolya (1996)|24-Jan-1997||http://us.imdb.com/M/title-exact?Kolya%20(1996)"
            b"|0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
            b"302|Dunston, Caf\xe9 (1995) (V)|14-Nov-1997||http://us.imdb.com/"
            b"|0|1|0|0|1|0|0|0|0|0|1|0|0|0|0|1|0|0|1\n"
            b"267|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        ),
        "u.user": b"196|49|M|writer|55105\n186|39|F|executive|V0R2H\n7|13|F|none|55436\n",
        "u.genre": b"unknown|0\nAction|1\n\n",
        "u1.base": b"1\t1\t5\t874965758\n",
    },
    "1M": {
        "ratings.dat": b"3::2::4::978300760\n1::10::5::978302109\n3::1::1::978301968\n",
        "movies.dat": (
            b"1::Toy Story (1995)::Animation|Children's|Comedy\n"
            b"2::Les Mis\xe9rables (1958)::Drama\n"
            b"10::Untitled Thing::Sci-Fi\n"
        ),
        "users.dat": b"1::F::1::10::48067\n2::M::56::0::70072\n3::M::25::12::55117\n",
        "README": b"SUMMARY\n",
    },
    "10M": {
        "ratings.dat": b"1::122::5::838985046\n1::185::0.5::838983525\n2::8606::3.5::838983392\n",
        "movies.dat": (
            b"122::Boomerang (1992)::Comedy|Romance\n"
            b"185::Am\xc3\xa9lie (2001)::Comedy\n"
            b"8606::Pull My Daisy (1958)::(no genres listed)\n"
        ),
        "tags.dat": b"15::4973::excellent!::1215184630\n",
    },
    "20M, 25M or latest": {
        "ratings.csv": (
            b"userId,movieId,rating,timestamp\n1,11,4.0,964982703\n1,171749,0.5,964981247\n2,11,3.5,964982224\n"
        ),
        "movies.csv": (
            b"movieId,title,genres\n"
            b'11,"American President, The (1995)",Comedy|Drama|Romance\n'
            b"171749,Death Note: Desu n\xc3\xb4to (2006\xe2\x80\x932007),(no genres listed)\n"
            b'56,"""Great Performances"" Cats (1998)",Musical\n'
        ),
        "links.csv": b"movieId,imdbId,tmdbId\n1,0114709,862\n",
    },
}
EVENT_ROWS = {
    "100K": [("196", "242", 3.0, 881250949), ("186", "302", 1.0, 891717742), ("196", "267", 5.0, 878887116)],
    "1M": [("3", "2", 4.0, 978300760), ("1", "10", 5.0, 978302109), ("3", "1", 1.0, 978301968)],
    "10M": [("1", "122", 5.0, 838985046), ("1", "185", 0.5, 838983525), ("2", "8606", 3.5, 838983392)],
    "20M, 25M or latest": [
        ("1", "11", 4.0, 964982703),
        ("1", "171749", 0.5, 964981247),
        ("2", "11", 3.5, 964982224),
    ],
}
ITEM_ROWS = {
    "100K": [
        ("242", "Kolya (1996)", ["genre: Comedy", "era: 1990s"]),
        (
            "302",
            "Dunston, Café (1995) (V)",
            [
                "genre: Action",
                "genre: Children's",
                "genre: Film-Noir",
                "genre: Sci-Fi",
                "genre: Western",
                "era: 1990s",
            ],
        ),
        ("267", "unknown", []),
    ],
    "1M": [
        (
            "1",
            "Toy Story (1995)",
            ["genre: Animation", "genre: Children's", "genre: Comedy", "era: 1990s"],
        ),
        ("2", "Les Misérables (1958)", ["genre: Drama", "era: 1950s"]),
        ("10", "Untitled Thing", ["genre: Sci-Fi"]),  # no year, no era
    ],
    "10M": [
        ("122", "Boomerang (1992)", ["genre: Comedy", "genre: Romance", "era: 1990s"]),
        ("185", "Amélie (2001)", ["genre: Comedy", "era: 2000s"]),
        ("8606", "Pull My Daisy (1958)", ["era: 1950s"]),
    ],
    "20M, 25M or latest": [
        (
            "11",
            "American President, The (1995)",
            ["genre: Comedy", "genre: Drama", "genre: Romance", "era: 1990s"],
        ),
        ("171749", "Death Note: Desu nôto (2006–2007)", []),
        ("56", '"Great Performances" Cats (1998)', ["genre: Musical", "era: 1990s"]),
    ],
}
USER_ROWS = {
    "100K": [
        ("196", "a male user, 49 years old, a writer"),
        ("186", "a female user, 39 years old, an executive"),
        ("7", "a female user, 13 years old"),
    ],
    "1M": [
        ("1", "a female user, under 18 years old, a K-12 student"),
        ("2", "a male user, 56 years old or older"),
        ("3", "a male user, 25-34 years old, a programmer"),
    ],
    "10M": [],
    "20M, 25M or latest": [],
}


# 70 sound lines of every file that is read: more than are looked at one by one.
LINES = {
    ("100K", "u.data"): [b"%d\t%d\t%d\t8812509%02d" % (i, i + 7, i % 5 + 1, i) for i in range(70)],
    ("1M", "ratings.dat"): [b"%d::%d::%d::9783007%02d" % (i, i + 7, i % 5 + 1, i) for i in range(70)],
    ("10M", "ratings.dat"): [b"%d::%d::%d.5::9783007%02d" % (i, i + 7, i % 5, i) for i in range(70)],
    ("20M, 25M or latest", "ratings.csv"): [
        b"%d,%d,%d.5,9649827%02d" % (i, i + 7, i % 5, i) for i in range(70)
    ],
    ("100K", "u.item"): [
        b"%d|Caf\xe9, %d (1995)|01-Jan-1995||http://us.imdb.com/|0|1%s" % (i, i, b"|0" * 17)
        for i in range(70)
    ],
    ("1M", "movies.dat"): [b"%d::Caf\xe9 %d (1995)::Drama|War" % (i, i) for i in range(70)],
    ("10M", "movies.dat"): [b"%d::Caf\xc3\xa9 %d (1995)::Drama|War" % (i, i) for i in range(70)],
    ("20M, 25M or latest", "movies.csv"): [b'%d,"Caf\xc3\xa9, %d ""x""",Drama' % (i, i) for i in range(70)],
    ("1M", "users.dat"): [b"%d::%c::25::%d::48067" % (i, b"FM"[i % 2], i % 21) for i in range(70)],
    ("100K", "u.user"): [b"%d|%d|M|writer|55105" % (i, i % 60 + 10) for i in range(70)],
}


def write(folder: Path, release: str) -> Path:
    for name, data in FOLDERS[release].items():
        (folder / name).write_bytes(data)
    return folder


def parts_of(file: DataFile, split_bytes: int = 2**20) -> list[Parsed]:
    """What the file's blocks parse to, in file order."""
    assert file.parse is not None
    splits = plan_splits((file,), split_bytes)
    return [file.parse(block.content) for split in splits for block in read_blocks(split, file)]


def rows_of(parts: list[Parsed]) -> list[tuple]:
    return [tuple(row.values()) for part in parts for row in part.table.to_pylist()]


def file_of(release: str, name: str, folder: Path) -> DataFile:
    source = describe(str(write(folder, release)))
    return next(f for f in source.events + source.items + source.users if f.path.endswith(f"/{name}"))


def parse(release: str, name: str, block: bytes, folder: Path) -> Parsed:
    """One block, by the parser of the file of that name."""
    parser = file_of(release, name, folder).parse
    assert parser is not None
    return parser(block)


@pytest.mark.parametrize("release", FOLDERS)
def test_every_release_is_read(tmp_path: Path, release: str):
    source = describe(str(write(tmp_path, release)))
    assert source.closed
    files = source.events + source.items + source.users
    is_csv = release == "20M, 25M or latest"
    assert all(file.complete and file.header == is_csv for file in files)
    assert rows_of(parts_of(source.events[0])) == EVENT_ROWS[release]
    assert rows_of(parts_of(source.items[0])) == ITEM_ROWS[release]
    assert [row for file in source.users for row in rows_of(parts_of(file))] == USER_ROWS[release]
    for file, schema in zip(files, (EVENTS, ITEMS, USERS), strict=False):
        assert [part.table.schema for part in parts_of(file)] == [schema]
        assert not any(part.quarantined.counts for part in parts_of(file))
        assert pickle.loads(pickle.dumps(file)) is not None  # it travels to the workers


@pytest.mark.parametrize("release", FOLDERS)
@pytest.mark.parametrize("split_bytes", [1, 7, 19, 20, 64])
def test_split_borders_lose_and_double_nothing(tmp_path: Path, release: str, split_bytes: int):
    source = describe(str(write(tmp_path, release)))
    assert rows_of(parts_of(source.events[0], split_bytes)) == EVENT_ROWS[release]
    assert rows_of(parts_of(source.items[0], split_bytes)) == ITEM_ROWS[release]
    assert [row for file in source.users for row in rows_of(parts_of(file, split_bytes))] == USER_ROWS[
        release
    ]


def test_windows_line_ends(tmp_path: Path):
    write(tmp_path, "20M, 25M or latest")
    for name in ("ratings.csv", "movies.csv"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes().replace(b"\n", b"\r\n"))
    source = describe(str(tmp_path))
    assert rows_of(parts_of(source.events[0])) == EVENT_ROWS["20M, 25M or latest"]
    assert rows_of(parts_of(source.items[0])) == ITEM_ROWS["20M, 25M or latest"]


def test_a_folder_given_as_uri(tmp_path: Path):
    source = describe(write(tmp_path, "1M").as_uri())
    assert source.events[0].path == f"{tmp_path.as_uri()}/ratings.dat"
    assert rows_of(parts_of(source.events[0])) == EVENT_ROWS["1M"]


@pytest.mark.parametrize(
    ("release", "gone", "what"),
    [
        ("100K", ["u.item"], "MovieLens 100K without u.item;"),
        ("100K", ["u.user", "u.data"], "MovieLens 100K without u.data and u.user;"),
        ("1M", ["ratings.dat"], "MovieLens 1M without ratings.dat;"),
        ("1M", ["movies.dat"], "MovieLens 1M without movies.dat;"),
        ("10M", ["movies.dat"], "MovieLens 10M without movies.dat;"),
        ("20M, 25M or latest", ["ratings.csv"], "MovieLens 20M, 25M or latest without ratings.csv;"),
    ],
)
def test_a_missing_partner_is_named(tmp_path: Path, release: str, gone: list[str], what: str):
    write(tmp_path, release)
    for name in gone:
        (tmp_path / name).unlink()
    with pytest.raises(UserError) as caught:
        describe(str(tmp_path))
    assert what in str(caught.value)
    left = sorted(set(FOLDERS[release]) - set(gone))
    assert str(caught.value).endswith(f"found: {', '.join(left)}")


def test_the_ratings_alone_are_not_enough(tmp_path: Path):
    with pytest.raises(UserError, match=r"without movies\.csv; unpack it again; found: ratings\.csv$"):
        describe(str(write(tmp_path, "20M, 25M or latest") / "ratings.csv"))


def test_another_folder_is_refused_with_what_was_expected_and_found(tmp_path: Path):
    with pytest.raises(UserError, match=r"no files of MovieLens; .*found: no file$"):
        describe(str(tmp_path))
    for number in range(30):
        (tmp_path / f"{number:02d}.json").touch()
    with pytest.raises(UserError) as caught:
        describe(str(tmp_path))
    message = str(caught.value)
    for name in ("u.item", "users.dat", "ratings.dat", "movies.csv"):
        assert name in message
    assert "00.json, 01.json" in message and "19.json" in message and "20.json" not in message
    assert "\n" not in message


def test_two_releases_in_one_folder_are_refused(tmp_path: Path):
    write(write(tmp_path, "1M"), "100K")
    with pytest.raises(UserError, match="files of 2 releases of MovieLens"):
        describe(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "header"),
    [("ratings.csv", b"movieId,userId,rating,timestamp"), ("movies.csv", b"1,Toy Story (1995),Comedy")],
)
def test_another_header_is_refused(tmp_path: Path, name: str, header: bytes):
    write(tmp_path, "20M, 25M or latest")
    lines = (tmp_path / name).read_bytes().split(b"\n", 1)[1]
    (tmp_path / name).write_bytes(header + b"\n" + lines)
    with pytest.raises(UserError, match=rf"{name}: the header is '{header.decode()[:5]}.*, not '"):
        describe(str(tmp_path))


@pytest.mark.parametrize(("release", "name"), LINES)
def test_a_truncated_file_is_refused(tmp_path: Path, release: str, name: str):
    file = file_of(release, name, tmp_path)
    (tmp_path / name).write_bytes(FOLDERS[release][name][:-1])
    with pytest.raises(UserError, match=f"{name}: the file is truncated"):
        parts_of(file)


LINE_1M = b"1::2::3::978300760\n"
MOVIE_100K = b"5|Copycat (1995)|01-Jan-1995||http://us.imdb.com/" + b"|0" * 19 + b"\n"


@pytest.mark.parametrize(
    ("release", "name", "good", "bad", "reason"),
    [
        ("1M", "ratings.dat", LINE_1M, b"1::2::3", "wrong field count"),
        ("1M", "ratings.dat", LINE_1M, b"1::2::3::4::5", "wrong field count"),
        ("1M", "ratings.dat", LINE_1M, b"1::2::3::978300760\r1::2::3::978300760", "wrong field count"),
        ("1M", "ratings.dat", LINE_1M, b"1,2::3::978300760", "wrong field count"),
        ("1M", "ratings.dat", LINE_1M, b"1,2,3,978300760", "wrong field count"),
        ("1M", "ratings.dat", LINE_1M, b"1\t2::3::978300760", "wrong field count"),
        ("1M", "ratings.dat", LINE_1M, b"", "empty line"),
        ("1M", "ratings.dat", LINE_1M, b"1::2::3::", "bad number"),
        ("1M", "ratings.dat", LINE_1M, b"::2::3::978300760", "bad number"),
        ("1M", "ratings.dat", LINE_1M, b"1::2::x::978300760", "bad number"),
        ("1M", "ratings.dat", LINE_1M, b"1::2.5::3::978300760", "bad number"),
        ("1M", "ratings.dat", LINE_1M, b"1:::2::3::978300760", "bad number"),
        ("1M", "ratings.dat", LINE_1M, b"1,5::2::3::978300760", "bad number"),
        ("1M", "ratings.dat", LINE_1M, b"-1::2::3::978300760", "bad number"),
        ("1M", "ratings.dat", LINE_1M, b"1\x00::2::3::978300760", "bad number"),
        ("1M", "ratings.dat", LINE_1M, b"1::2::3::" + b"9" * 30, "bad number"),
        ("1M", "ratings.dat", LINE_1M, b"1::2::nan::978300760", "rating out of range"),
        ("1M", "ratings.dat", LINE_1M, b"1::2::50::978300760", "rating out of range"),
        ("1M", "ratings.dat", LINE_1M, b"1::2::0.5::978300760", "rating out of range"),
        ("1M", "ratings.dat", LINE_1M, b"1::2::3::978300760000", "impossible timestamp"),
        ("1M", "ratings.dat", LINE_1M, b"1::2::3::-1", "impossible timestamp"),
        ("10M", "ratings.dat", b"1::2::0.5::978300760\n", b"1::2::0::978300760", "rating out of range"),
        ("100K", "u.data", b"1\t2\t3\t978300760\n", b"1 2 3 978300760", "wrong field count"),
        ("100K", "u.data", b"1\t2\t3\t978300760\n", b"1\t2\t0.5\t978300760", "rating out of range"),
        ("20M, 25M or latest", "ratings.csv", b"1,2,0.5,978300760\n", b'"1",2,3,978300760', "bad number"),
        ("20M, 25M or latest", "ratings.csv", b"1,2,0.5,978300760\n", b"1,2,5.5,978300760", "rating out of range"),
        ("1M", "movies.dat", b"1::T::Drama\n", b"11::No genres", "wrong field count"),
        ("1M", "movies.dat", b"1::T::Drama\n", b"x::Title::Drama", "bad number"),
        ("1M", "movies.dat", b"1::T::Drama\n", b"::Title::Drama", "bad number"),
        ("1M", "movies.dat", b"1::T::Drama\n", b"   ", "empty line"),
        ("10M", "movies.dat", b"1::T::Drama\n", b"2::Am\xe9lie (2001)::Comedy", "unreadable"),
        ("100K", "u.item", MOVIE_100K, b"5|Copycat (1995)|01-Jan-1995|||0", "wrong field count"),
        ("100K", "u.item", MOVIE_100K, MOVIE_100K.rstrip()[:-1] + b"2", "bad number"),
        ("20M, 25M or latest", "movies.csv", b"1,T,Drama\n", b'2,"Open (1995),Drama', "unreadable"),
        ("20M, 25M or latest", "movies.csv", b"1,T,Drama\n", b'2,"A"B,Drama', "unreadable"),
        ("20M, 25M or latest", "movies.csv", b"1,T,Drama\n", b"2,Heat, The (1995),Drama", "wrong field count"),
        ("1M", "users.dat", b"4::M::25::12::1\n", b"4::M::25::12", "wrong field count"),
        ("1M", "users.dat", b"4::M::25::12::1\n", b"x::M::25::12::1", "bad number"),
        ("1M", "users.dat", b"4::M::25::12::1\n", b"4::M::26::12::1", "bad profile"),
        ("1M", "users.dat", b"4::M::25::12::1\n", b"4::M::25::21::1", "bad profile"),
        ("1M", "users.dat", b"4::M::25::12::1\n", b"4::m::25::12::1", "bad profile"),
        ("100K", "u.user", b"4|24|M|technician|43537\n", b"4|24|M|wizard|43537", "bad profile"),
        ("100K", "u.user", b"4|24|M|technician|43537\n", b"4|0|M|technician|43537", "bad profile"),
        ("100K", "u.user", b"4|24|M|technician|43537\n", b"4|24|technician|43537", "wrong field count"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_set_aside_with_its_reason(
    tmp_path: Path, release: str, name: str, good: bytes, bad: bytes, reason: str
):
    parsed = parse(release, name, good * 2 + bad + b"\n" + good, tmp_path)
    assert parsed.rows_read == 4
    assert parsed.quarantined.counts == Counter({reason: 1})
    text = bad.decode("utf-8", "backslashreplace")
    assert [(line.row, line.reason, line.text) for line in parsed.quarantined.shown] == [(2, reason, text)]
    assert parsed.table == pa.concat_tables([parse(release, name, good, tmp_path).table] * 3)
    if parsed.table.schema != ITEMS:
        assert parsed.row_of is not None
        assert parsed.row_of.tolist() == [0, 1, 3]


def test_a_block_without_a_sound_line_keeps_its_schema(tmp_path: Path):
    for name, schema in (("ratings.dat", EVENTS), ("movies.dat", ITEMS), ("users.dat", USERS)):
        parsed = parse("1M", name, b"damage\n\n", tmp_path)
        assert (parsed.rows_read, parsed.table.num_rows, parsed.table.schema) == (2, 0, schema)
        assert parsed.quarantined.counts == Counter({"wrong field count": 1, "empty line": 1})


def test_twenty_bad_lines_are_shown_and_all_are_counted(tmp_path: Path):
    parsed = parse("1M", "ratings.dat", (LINE_1M + b"1::2::9::978300760\n1::2\n") * 1000, tmp_path)
    assert (parsed.rows_read, parsed.table.num_rows) == (3000, 1000)
    assert parsed.quarantined.counts == Counter({"rating out of range": 1000, "wrong field count": 1000})
    shown = [(line.row, line.reason) for line in parsed.quarantined.shown]
    assert [row for row, reason in shown if reason == "rating out of range"] == list(range(1, 60, 3))
    assert [row for row, reason in shown if reason == "wrong field count"] == list(range(2, 60, 3))
    assert parsed.row_of is not None
    assert parsed.row_of.tolist() == list(range(0, 3000, 3))


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (b"7::::Drama", ("7", "", ["genre: Drama"])),  # kept: the stage gives it a name
        (b"7:: ::", ("7", "", [])),
        (b"7::Show (1995-1997)::Drama||  War", ("7", "Show (1995-1997)", ["genre: Drama", "genre: War"])),
        (b"7::1984 (1984) ::Drama", ("7", "1984 (1984)", ["genre: Drama", "era: 1980s"])),
        (b"7::Film (1995) (V)::", ("7", "Film (1995) (V)", ["era: 1990s"])),
        (b"7::Film (995)::", ("7", "Film (995)", [])),
        (b"007::Bond::(no genres listed)", ("007", "Bond", [])),
    ],
)
def test_a_movie(line: bytes, row: tuple):
    assert read_movie(line, "::", "latin-1") == row


def test_a_movie_of_100k_without_title():
    assert read_movie_100k(b"7||||" + b"|0" * 18 + b"|1") == ("7", "", ["genre: Western"])


def test_markup_is_taken_out_of_titles(tmp_path: Path):
    parsed = parse("1M", "movies.dat", b"1::Et Dieu&#8230; (1956)::Drama\n2::Heat::Crime\n", tmp_path)
    assert parsed.table["title"].to_pylist() == ["Et Dieu… (1956)", "Heat"]
    assert parsed.cleaned == Counter({"titles": 1})


def test_profiles_say_what_is_known():
    assert read_user_1m(b"9::F::56::20::1") == ("9", "a female user, 56 years old or older, a writer")
    assert read_user_1m(b"9::M::18::0::1") == ("9", "a male user, 18-24 years old")
    assert read_user_100k(b"9|24|M|technician|1") == ("9", "a male user, 24 years old, a technician")
    assert read_user_100k(b"9|18|F|salesman|1") == ("9", "a female user, 18 years old, in sales")
    assert read_user_100k(b"9|7|M|other|1") == ("9", "a male user, 7 years old")


JUNK = st.one_of(
    st.binary(max_size=8),
    st.sampled_from(
        [b"\r", b"\n", b"\r\n", b"\x00", b'"', b"\t", b",", b"::", b"|", b" ", b"nan", b"9" * 40, b"1e999", b"-"]
    ),
)  # fmt: skip
DAMAGE = st.fixed_dictionaries(
    {},
    optional={
        "line": st.integers(0, 69),
        "at": st.integers(0, 30),
        "cut": st.integers(0, 30),
        "insert": JUNK,
        "repeat": st.integers(1, 30),
        "join": st.just(True),
    },
)


def damaged(lines: list[bytes], damages: list[dict]) -> tuple[bytes, list[bytes]]:
    """The block, and the lines that are as they were."""
    whole = [line + b"\n" for line in lines]
    touched = set()
    for damage in damages:
        row, at = damage.get("line", 0), damage.get("at", 0)
        touched.add(row)
        line = whole[row]
        end = b"" if damage.get("join") else b"\n"
        if damage.get("join"):
            touched.add(row + 1)
        text = line.removesuffix(b"\n")
        again = text[at : at + damage["repeat"]] if "repeat" in damage else b""
        whole[row] = text[:at] + damage.get("insert", b"") + again + text[at + damage.get("cut", 0) :] + end
    return b"".join(whole), [line for row, line in enumerate(lines) if row not in touched]


@pytest.mark.parametrize(("release", "name"), LINES)
def test_whatever_the_bytes_every_line_is_accounted_for(tmp_path: Path, release: str, name: str):
    parse_block = file_of(release, name, tmp_path).parse
    assert parse_block is not None
    lines = LINES[release, name]
    sound = parse_block(b"\n".join(lines) + b"\n")
    assert sound.table.num_rows == 70
    row_of_line = dict(zip(lines, sound.table.to_pylist(), strict=True))

    @settings(deadline=None, max_examples=150)
    @given(st.lists(DAMAGE, min_size=1, max_size=4))
    def check(damages: list[dict]) -> None:
        block, untouched = damaged(lines, damages)
        parsed = parse_block(block)
        ends = block.replace(b"\r\n", b"\n")
        assert parsed.rows_read == ends.count(b"\n") + (not ends.endswith(b"\n") and bool(ends))
        assert parsed.rows_read == parsed.table.num_rows + parsed.quarantined.counts.total()
        assert parsed.table.schema == sound.table.schema
        parsed.table.validate(full=True)
        rows = iter(parsed.table.to_pylist())
        assert all(row_of_line[line] in rows for line in untouched)  # in this order

    @settings(deadline=None, max_examples=150)
    @given(st.binary(max_size=200))
    def check_any(block: bytes) -> None:
        parsed = parse_block(block)
        assert parsed.rows_read == parsed.table.num_rows + parsed.quarantined.counts.total()
        assert parsed.table.schema == sound.table.schema

    check()
    check_any()


@pytest.mark.skipif(not REAL.is_dir(), reason="MovieLens-1M is not at ../shared/data/ml-1m")
def test_the_real_files():
    source = describe(str(REAL))
    events = parts_of(source.events[0], 1_000_000)
    items, users = parts_of(source.items[0], 10_000), parts_of(source.users[0], 10_000)
    assert len(events) == 12  # 11.9 MB
    for parts, num_rows in ((events, 487_650), (items, 3883), (users, 6040)):
        assert sum(part.rows_read for part in parts) == num_rows
        assert sum(part.table.num_rows for part in parts) == num_rows
        assert not any(part.quarantined.counts for part in parts)
    ratings = pa.concat_tables([part.table for part in events])
    assert set(ratings["rating"].to_pylist()) == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert len(ratings["user"].unique()) == 2999 and len(ratings["item"].unique()) == 3615
    lines = (REAL / "ratings.dat").read_text().splitlines()
    for row in (0, 123_456, 487_649):
        user, item, stars, seconds = ratings.slice(row, 1).to_pylist()[0].values()
        assert f"{user}::{item}::{stars:g}::{seconds}" == lines[row]
    assert set(ratings["item"].to_pylist()) <= {row[0] for row in rows_of(items)}
    assert set(ratings["user"].to_pylist()) <= {row[0] for row in rows_of(users)}
    assert all(title for _, title, _ in rows_of(items))
    assert all(attributes[-1].startswith("era: ") for *_, attributes in rows_of(items))
