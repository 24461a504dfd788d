"""The prepare stage on files that are elsewhere, cut short or mangled: no row is lost in silence."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.stages import prepare
from tests.conftest import local_ray
from tests.raw_data import (
    SOURCES,
    adds_up,
    amazon_2018,
    lines,
    make_events,
    ml_1m,
    prepared,
    report_of,
)

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def ray_local() -> Iterator[None]:
    with local_ray(2, store_mib=256):
        yield


def test_bad_lines_are_set_aside_with_their_numbers(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    events = make_events()
    ml_1m(raw, events)
    rows = (raw / "ratings.dat").read_text().splitlines()
    for first in (0, 60):
        rows[first + 9] = "1::5"
        rows[first + 19] = "1::5::many::978300000"
        rows[first + 29] = "1::5::9::978300000"
        rows[first + 39] = "1::999::3::978300000"
        rows[first + 49] = "777::5::3::978300000"
        rows[first + 59] = "1::5::3::-5"
    lines(rows, raw / "ratings.dat")
    data = {"dataset": "movielens", "raw_dir": str(raw)}
    with pytest.raises(UserError, match=r"ratings.dat line 10: wrong field count: '1::5'; 12 of"):
        prepared(tmp_path / "run", dict(data))
    assert (
        len((tmp_path / "run/data/quarantine/events.jsonl").read_text().splitlines()) == 12
    )  # also of a run that stops
    store = prepared(tmp_path / "run", {**data, "max_bad_fraction": 0.03})
    adds_up(store)
    found = [
        json.loads(line) for line in (tmp_path / "run/data/quarantine/events.jsonl").read_text().splitlines()
    ]
    assert {(line["line"], line["reason"]) for line in found} == {
        (first + line, reason)
        for first in (0, 60)
        for line, reason in (
            (10, "wrong field count"), (20, "bad number"), (30, "rating out of range"), (40, "unknown item"),
            (50, "unknown user"), (60, "impossible timestamp"),
        )
    }  # fmt: skip
    assert all(line["path"].endswith("ratings.dat") for line in found)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and its address on a web server of this machine (without byte ranges, as Python's own)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_the_same_data_from_a_folder_a_uri_and_the_web(tmp_path: Path, web: tuple[Path, str]) -> None:
    """A path, file:// through pyarrow, http:// through fsspec: the workers read all three alike."""
    folder, address = web
    data = amazon_2018(folder, make_events())
    found = []
    for number, raw in enumerate((str(folder), folder.as_uri(), address)):
        store = prepared(tmp_path / f"run-{number}", {**data, "raw_dir": raw})
        adds_up(store)
        found.append({name: store.read(name) for name in prepare.ARTIFACTS})
    for name in prepare.ARTIFACTS:
        assert found[0][name].equals(found[1][name]) and found[0][name].equals(found[2][name])


def test_a_file_that_goes_away_or_breaks_off_is_one_line(tmp_path: Path, web: tuple[Path, str]) -> None:
    folder, address = web
    data = amazon_2018(folder, make_events())
    content = (folder / "Books_5.json.gz").read_bytes()
    (folder / "Books_5.json.gz").write_bytes(content[: len(content) // 2])
    for raw in (str(folder), address):
        with pytest.raises(UserError, match=r"Books_5.json.gz: cannot be read, or is truncated") as caught:
            prepared(tmp_path / "run", {**data, "raw_dir": raw})
        assert "Traceback" not in str(caught.value).split("\n")[0]
    (folder / "Books_5.json.gz").unlink()
    with pytest.raises(UserError, match="no file of interactions"):
        prepared(tmp_path / "run", {**data, "raw_dir": address})


@given(
    seed=st.integers(0, 2**32 - 1),
    source=st.sampled_from(
        ["ml_1m", "ml_latest", "amazon_2018", "amazon_2018_ratings", "amazon_2023", "own_csv", "own_jsonl"]
    ),
)
@settings(max_examples=25, deadline=None)
def test_mangled_files_lose_no_row(tmp_path_factory: pytest.TempPathFactory, seed: int, source: str) -> None:
    """Bytes of the interactions are changed, taken out and put in: every line is kept, quarantined or filtered."""
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("mangled")
    raw = folder / "raw"
    raw.mkdir()
    data = SOURCES[source](raw, make_events(seed))
    (file,) = [
        path for path in raw.iterdir()
        if path.name in ("ratings.dat", "ratings.csv", "Books_5.json.gz", "Books.csv", "Books.jsonl.gz", "e.csv", "e.jsonl.gz")
    ]  # fmt: skip
    packed = file.suffix == ".gz"
    content = bytearray(gzip.decompress(file.read_bytes()) if packed else file.read_bytes())
    header = content.index(b"\n") + 1 if source in ("ml_latest", "own_csv") else 0
    for place in rng.integers(header, len(content) - 1, 40).tolist():
        place = min(place, len(content) - 1)  # earlier changes may have taken out what was there
        change = rng.integers(4)
        if change == 0:
            content[place] = int(rng.integers(256))
        elif change == 1:
            del content[place : place + int(rng.integers(1, 30))]
        elif change == 2:
            content[place:place] = rng.bytes(int(rng.integers(1, 20)))
        else:
            content[place:place] = rng.choice(
                [b"\n", b"\n\n", b'"', b"\x00", b"::", b",", b"null", b"9" * 30, b"\r\n"]
            )
    if not content.endswith(b"\n"):
        content += b"\n"
    num_lines = bytes(content[header:]).replace(b"\r\n", b"\n").count(b"\n")
    file.write_bytes(gzip.compress(bytes(content)) if packed else bytes(content))
    store = prepared(folder / "run", {**data, "raw_dir": str(raw), "max_bad_fraction": 1.0})
    adds_up(store)
    assert report_of(store)["lines_read"] == num_lines
    # A line break that was put between quotes makes one row of two lines.
    assert report_of(store)["rows_read"] == num_lines or source == "own_csv"
    assert report_of(store)["rows_kept"] > 0
