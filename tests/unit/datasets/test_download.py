"""The downloader against a real HTTP server on this machine, real archives, a real terminal."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import io
import ipaddress
import os
import pty
import random
import re
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dpo4rec_ray.cli.download_dataset import main
from dpo4rec_ray.datasets import fetch
from dpo4rec_ray.datasets.archives import unpack
from dpo4rec_ray.datasets.download import PUBLISHED, PUBLISHED_MODELS
from dpo4rec_ray.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
NOISE = random.Random(0).randbytes(300_000)  # does not compress: the archive is larger than one read


def zip_of(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members:
            zipped.writestr(name, content)
    return buffer.getvalue()


ARCHIVE = zip_of(("ml-latest-small/ratings.csv", b"userId,movieId\n"), ("ml-latest-small/noise.bin", NOISE))


@dataclass
class Answer:
    """How one path is served.

    drops: for each request in turn, after how many bytes of the body the connection closes; None or no entry: never.
    """

    content: bytes = b""
    etag: str = ""
    modified: str = ""
    status: list[int] = field(default_factory=list)  # for each request in turn, then 200
    headers: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    if_range: bool = True
    length: bool = True
    drops: list[int | None] = field(default_factory=list)
    slow_after: int | None = None  # stops sending there until the client is gone


@dataclass
class Request:
    path: str
    range: str
    encoding: str
    sent: int = 0


class Site:
    """A real HTTP server; `log` has every request and how many bytes of the body went out."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.log: list[Request] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.serve(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        request = Request(
            handler.path, handler.headers.get("Range", ""), handler.headers.get("Accept-Encoding", "")
        )
        self.log.append(request)
        answer = self.answers.get(handler.path.partition("?")[0])
        if answer is None:
            handler.send_error(404)
            return
        status = answer.status.pop(0) if answer.status else 200
        start, total = 0, len(answer.content)
        fresh = not answer.if_range or handler.headers.get("If-Range") in (answer.etag, answer.modified)
        if status == 200 and answer.ranges and request.range and fresh:
            start = int(request.range.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < total else 416
        handler.send_response(status)
        for name, value in {"ETag": answer.etag, "Last-Modified": answer.modified, **answer.headers}.items():
            if value:
                handler.send_header(name, value)
        body = answer.content[start:] if status in (200, 206) else b""
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if status == 416:
            handler.send_header("Content-Range", f"bytes */{total}")
        if answer.length and "Content-Length" not in answer.headers:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        drop = answer.drops.pop(0) if answer.drops else None
        stop = answer.slow_after if answer.slow_after is not None else drop
        request.sent = len(body[:stop])
        handler.wfile.write(body[:stop])
        if answer.slow_after is not None:
            handler.wfile.flush()
            while handler.connection.recv(1):  # until the client is gone
                pass

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.log if request.path.partition("?")[0] == path]


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.0)
    site = Site()
    yield site
    site.close()


def small(site: Site, folder: Path, *more: str) -> int:
    """Fetch ml-latest-small, which has no pinned checksum, from the site."""
    return main(["ml-latest-small", str(folder), "--yes", "--url", f"{site.url}/small.zip", *more])


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr; the only one that speaks of an error, and no traceback anywhere."""
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert printed.err.endswith(lines[0] + "\n")
    assert "data.raw_dir" not in printed.out
    return lines[0]


# --- what can be had


def test_the_catalogue() -> None:
    assert set(PUBLISHED) >= {
        "ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-latest-small",
        "amazon2018-books", "amazon2018-beauty", "amazon2018-gift-cards", "amazon2023-books",
    }  # fmt: skip
    assert len(PUBLISHED) == 6 + 29 + 1 + 34
    for dataset in PUBLISHED.values():
        assert dataset.terms and dataset.link.startswith("https://")
        for file in dataset.files:
            assert file.url.startswith("https://") and file.url.endswith(f"/{file.name}")
            assert re.fullmatch("(md5:[0-9a-f]{32})?", file.checksum)
    assert [file.url for file in PUBLISHED["amazon2018-beauty"].files] == [
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/categoryFilesSmall/All_Beauty_5.json.gz",
        "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/metaFiles2/meta_All_Beauty.json.gz",
    ]


def test_list_prints_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        *PUBLISHED,
        *PUBLISHED_MODELS,
    ]


# --- a download that goes well


def test_fetches_verifies_and_unpacks(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site.answers["/small.zip"] = Answer(ARCHIVE, etag='"1"')
    assert small(site, tmp_path / "new" / "data", "--sha256", sha256(ARCHIVE).upper()) == 0
    printed = capsys.readouterr()
    folder = tmp_path / "new" / "data" / "ml-latest-small"
    assert printed.out == f"data.raw_dir={folder}\n"
    assert "no commercial use" in printed.err and "ml-latest-small-README.html" in printed.err
    assert [request.encoding for request in site.log] == ["identity"]
    assert (folder / "noise.bin").read_bytes() == NOISE
    assert (folder / "ratings.csv").read_bytes() == b"userId,movieId\n"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["ml-latest-small", "ml-latest-small.zip"]


@pytest.mark.parametrize("form", ["MD5 (ml-latest-small.zip) = {}\n", "{}  ml-latest-small.zip\n", "{}"])
def test_the_companion_checksum_is_used(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """A right one passes without a word, a wrong one refuses the file."""
    right = hashlib.md5(ARCHIVE).hexdigest().upper()
    site.answers["/small.zip"] = Answer(ARCHIVE)
    site.answers["/small.zip.md5"] = Answer(form.format(right).encode())
    assert small(site, tmp_path / "right") == 0
    assert "no checksum" not in capsys.readouterr().err
    site.answers["/small.zip.md5"] = Answer(form.format("0" * 32).encode())
    assert small(site, tmp_path / "wrong") == 2
    assert f"md5 is {right.lower()}, expected {'0' * 32}" in one_error_line(capsys)


@pytest.mark.parametrize(
    "companion", [None, Answer(b"<html>" + b"0" * 32 + b" " * 2000), Answer(b"nothing here")]
)
def test_without_a_published_checksum_the_own_one_is_told(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], companion: Answer | None
) -> None:
    site.answers["/small.zip"] = Answer(ARCHIVE)
    if companion:
        site.answers["/small.zip.md5"] = companion
    assert small(site, tmp_path) == 0
    assert f"no checksum was published; what came has sha256 {sha256(ARCHIVE)}\n" in capsys.readouterr().err


def test_the_hubs_checksum_is_taken_from_the_redirect(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events, items = b'{"rating": 5.0}\n', b'{"title": "Card"}\n'
    for name, content in (("events", events), ("items", items)):
        site.answers[f"/{name}"] = Answer(
            status=[302, 302],
            headers={"Location": f"/cdn/{name}", "X-Linked-Etag": f'"{sha256(content)}"'},
        )
        site.answers[f"/cdn/{name}"] = Answer(content)
    arguments = ["--yes", "--url", f"{site.url}/events", "--url", f"{site.url}/items"]
    assert main(["amazon2023-Gift_Cards", str(tmp_path / "a"), *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"data.raw_dir={tmp_path / 'a'}\n"
    assert "no checksum" not in printed.err
    assert (tmp_path / "a" / "Gift_Cards.jsonl").read_bytes() == events
    assert (tmp_path / "a" / "meta_Gift_Cards.jsonl").read_bytes() == items
    site.answers["/cdn/items"].content = b'{"title": "Bard"}\n'
    assert main(["amazon2023-gift-cards", str(tmp_path / "b"), *arguments]) == 2
    assert "sha256 is" in one_error_line(capsys)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "Gift_Cards.jsonl",
        "meta_Gift_Cards.jsonl.bad",
    ]


def test_a_gz_stays_a_gz_whatever_the_server_calls_it(site: Site, tmp_path: Path) -> None:
    packed = gzip.compress(b'{"overall": 5.0}\n')
    site.answers["/data.json.gz"] = Answer(packed, headers={"Content-Encoding": "x-gzip"})
    url = f"{site.url}/data.json.gz"
    assert main(["amazon2018-gift-cards", str(tmp_path), "--yes", "--url", url, "--url", url]) == 0
    assert (tmp_path / "Gift_Cards_5.json.gz").read_bytes() == packed
    assert (tmp_path / "meta_Gift_Cards.json.gz").read_bytes() == packed


def test_what_is_complete_is_not_fetched_again(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run asks nobody: neither the server nor, without --yes, the user."""
    site.answers["/small.zip"] = Answer(ARCHIVE)
    assert small(site, tmp_path) == 0
    requests = len(site.log)
    noise = tmp_path / "ml-latest-small" / "noise.bin"
    written_ns = noise.stat().st_mtime_ns
    capsys.readouterr()
    assert main(["ml-latest-small", str(tmp_path), "--url", f"{site.url}/small.zip"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "ml-latest-small is complete already\n"
    assert printed.out == f"data.raw_dir={tmp_path / 'ml-latest-small'}\n"
    assert len(site.log) == requests
    assert noise.stat().st_mtime_ns == written_ns


# --- connections that break


def test_goes_on_after_the_connection_broke(site: Site, tmp_path: Path) -> None:
    site.answers["/small.zip"] = Answer(ARCHIVE, etag='"1"', drops=[100_000, 50_000])
    assert small(site, tmp_path, "--sha256", sha256(ARCHIVE)) == 0
    asked = site.asked("/small.zip")
    assert [request.range for request in asked] == ["", "bytes=100000-", "bytes=150000-"]
    assert sum(request.sent for request in asked) == len(ARCHIVE)


@pytest.mark.parametrize("mark", [{"etag": '"1"'}, {"modified": "Tue, 01 Jan 2019 00:00:00 GMT"}])
def test_a_second_run_goes_on_where_the_first_gave_up(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], mark: dict[str, str]
) -> None:
    answer = site.answers["/small.zip"] = Answer(ARCHIVE, **mark, drops=[70_000, 0, 0, 0, 0, 0])
    assert small(site, tmp_path) == 2
    assert "70000 bytes are kept" in one_error_line(capsys)
    assert len(site.log) == 6
    assert (tmp_path / "ml-latest-small.zip.part").read_bytes() == ARCHIVE[:70_000]
    assert not (tmp_path / "ml-latest-small.zip").exists()
    answer.drops = []
    assert small(site, tmp_path) == 0
    assert site.asked("/small.zip")[-1].sent == len(ARCHIVE) - 70_000
    assert (tmp_path / "ml-latest-small.zip").read_bytes() == ARCHIVE


@pytest.mark.parametrize("answer", [Answer(ARCHIVE, etag='"1"', ranges=False), Answer(ARCHIVE, etag='W/"1"')])
def test_a_server_that_cannot_resume_starts_afresh(site: Site, tmp_path: Path, answer: Answer) -> None:
    """No ranges; or nothing that says that the rest is of the same file."""
    site.answers["/small.zip"] = Answer(**{**vars(answer), "drops": [100_000]})
    assert small(site, tmp_path, "--sha256", sha256(ARCHIVE)) == 0
    assert [request.sent for request in site.asked("/small.zip")] == [100_000, len(ARCHIVE)]


def test_a_server_that_always_breaks_off_is_not_asked_for_ever(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.answers["/small.zip"] = Answer(ARCHIVE, etag='"1"', ranges=False, drops=[1000] * 100)
    assert small(site, tmp_path) == 2
    assert "5 times in a row" in one_error_line(capsys)
    assert len(site.log) == 6  # the first brought something new
    assert not (tmp_path / "ml-latest-small.zip").exists()


@pytest.mark.parametrize("if_range", [True, False])
def test_a_file_that_changed_starts_afresh(site: Site, tmp_path: Path, if_range: bool) -> None:
    """Also with a server that does not know If-Range: its ETag tells."""
    changed = zip_of(("ml-latest-small/noise.bin", NOISE[::-1]))
    answer = site.answers["/small.zip"] = Answer(ARCHIVE, etag='"1"', drops=[100_000, 0, 0, 0, 0, 0])
    assert small(site, tmp_path) == 2
    site.answers["/small.zip"] = Answer(changed, etag='"2"', if_range=if_range)
    assert answer.drops == []
    assert small(site, tmp_path, "--sha256", sha256(changed)) == 0
    assert (tmp_path / "ml-latest-small" / "noise.bin").read_bytes() == NOISE[::-1]


def test_another_address_does_not_go_on_with_the_first_ones_file(site: Site, tmp_path: Path) -> None:
    changed = zip_of(("ml-latest-small/noise.bin", NOISE[::-1]))
    same_day = "Tue, 01 Jan 2019 00:00:00 GMT"
    site.answers["/small.zip"] = Answer(ARCHIVE, modified=same_day, drops=[100_000, 0, 0, 0, 0, 0])
    assert small(site, tmp_path) == 2
    site.answers["/mirror.zip"] = Answer(changed, modified=same_day)
    url = f"{site.url}/mirror.zip"
    assert main(["ml-latest-small", str(tmp_path), "--yes", "--url", url, "--sha256", sha256(changed)]) == 0
    assert [request.range for request in site.asked("/mirror.zip")] == [""]


@pytest.mark.parametrize("extra", [b"", b"too much"])
def test_a_part_that_is_whole_or_too_long(site: Site, tmp_path: Path, extra: bytes) -> None:
    """Broken off between the last byte and the name: nothing is sent again. Too long: it starts afresh."""
    site.answers["/small.zip"] = Answer(ARCHIVE, etag='"1"')
    part = tmp_path / "ml-latest-small.zip.part"
    part.write_bytes(ARCHIVE + extra)
    Path(f"{part}.state").write_text(f'{site.url}/small.zip\n"1"')
    assert small(site, tmp_path, "--sha256", sha256(ARCHIVE)) == 0
    sent = [request.sent for request in site.asked("/small.zip")]
    assert sent == ([0, len(ARCHIVE)] if extra else [0])


def test_a_busy_server_is_asked_again(site: Site, tmp_path: Path) -> None:
    site.answers["/small.zip"] = Answer(ARCHIVE, status=[503, 429])
    assert small(site, tmp_path) == 0
    assert len(site.asked("/small.zip")) == 3


def test_nobody_answers(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dead = Site()
    dead.close()
    assert small(dead, tmp_path) == 2
    line = one_error_line(capsys)
    assert "Connection refused" in line and dead.url in line


def test_a_pause_after_each_failure(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 s after progress, then 2, 4, ... s: here in units of 0.01 s, so 0.01 + 0.02 + 0.04 s at least."""
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.01)
    site.answers["/small.zip"] = Answer(ARCHIVE, etag='"1"', drops=[10, 0, 0])
    started = time.monotonic()
    assert small(site, tmp_path) == 0
    assert time.monotonic() - started >= 0.07
    assert capsys.readouterr().err.count("trying again in") == 3


# --- something else came


def test_a_wrong_checksum_sets_the_file_aside(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.answers["/small.zip"] = Answer(ARCHIVE[:-1] + b"x", etag='"1"')
    assert small(site, tmp_path, "--sha256", sha256(ARCHIVE)) == 2
    assert f"expected {sha256(ARCHIVE)}" in one_error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["ml-latest-small.zip.bad"]
    site.answers["/small.zip"] = Answer(ARCHIVE, etag='"2"')
    assert small(site, tmp_path, "--sha256", sha256(ARCHIVE)) == 0
    assert site.asked("/small.zip")[-1].range == ""


def test_the_pinned_checksum_holds_for_a_mirror_too(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.answers["/ml-1m.zip"] = Answer(ARCHIVE)
    assert main(["ml-1m", str(tmp_path), "--yes", "--url", f"{site.url}/ml-1m.zip"]) == 2
    assert "expected c4d9eecfca2ab87c1945afe126590906" in one_error_line(capsys)


def test_a_damaged_file_that_is_there_is_set_aside(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ml-1m.zip").write_bytes(ARCHIVE)
    assert main(["ml-1m", str(tmp_path), "--yes"]) == 2
    assert "md5 is" in one_error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["ml-1m.zip.bad"]


def test_a_web_page_instead_of_the_file(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.answers["/page"] = Answer(b"<!DOCTYPE html><title>We have moved</title>")
    url = f"{site.url}/page"
    assert main(["amazon2018-books", str(tmp_path), "--yes", "--url", url, "--url", url]) == 2
    assert "not a .gz file" in one_error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["Books_5.json.gz.bad"]


def test_a_body_without_length_that_was_cut(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """HTTP/1.0 without Content-Length: the end of the connection is the end of the file, and the archive tells."""
    site.answers["/small.zip"] = Answer(ARCHIVE, length=False, drops=[100_000])
    assert small(site, tmp_path) == 2
    assert "damaged" in one_error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["ml-latest-small.zip.bad"]


@pytest.mark.parametrize("status", [401, 403, 404, 410, 206, 416])
def test_a_refusal_is_final(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    site.answers["/small.zip"] = Answer(ARCHIVE, status=[status] * 9)
    assert small(site, tmp_path) == 2
    line = one_error_line(capsys)
    assert f"answers {status}" in line and f"{site.url}/small.zip" in line
    assert len(site.log) == 1
    assert list(tmp_path.iterdir()) == []


def test_redirects_are_followed_but_not_for_ever(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.answers["/small.zip"] = Answer(status=[301], headers={"Location": "/there.zip"})
    site.answers["/there.zip"] = Answer(ARCHIVE)
    assert small(site, tmp_path / "a") == 0
    capsys.readouterr()
    site.answers["/small.zip"] = Answer(status=[301] * 99, headers={"Location": "/small.zip"})
    assert small(site, tmp_path / "b") == 2
    assert "redirects" in one_error_line(capsys)


@pytest.fixture
def tls_site(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Path]]:
    """A site with TLS, and the file of its certificate, which nobody has signed."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
    certificate = builder.add_extension(here, critical=False).sign(key, hashes.SHA256())
    folder = tmp_path_factory.mktemp("tls")
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    secure = Site()
    secure.server.socket = context.wrap_socket(secure.server.socket, server_side=True)
    secure.url = secure.url.replace("http:", "https:")
    yield secure, folder / "certificate.pem"
    secure.close()


def test_https_does_not_turn_into_http(
    site: Site,
    tls_site: tuple[Site, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secure, certificate = tls_site
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    secure.answers["/small.zip"] = Answer(ARCHIVE)
    assert small(secure, tmp_path / "a") == 0
    capsys.readouterr()
    secure.answers["/small.zip"] = Answer(status=[302], headers={"Location": f"{site.url}/plain.zip"})
    site.answers["/plain.zip"] = Answer(ARCHIVE)
    assert small(secure, tmp_path / "b") == 2
    assert "without encryption" in one_error_line(capsys)
    assert list((tmp_path / "b").iterdir()) == []


def test_an_unknown_certificate_is_refused_at_once(
    tls_site: tuple[Site, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secure, _ = tls_site
    assert small(secure, tmp_path) == 2
    line = one_error_line(capsys)
    assert "certificate" in line and "times in a row" not in line
    assert list(tmp_path.iterdir()) == []


def test_secrets_in_the_address_are_not_shown(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = site.url.removeprefix("http://")
    site.answers["/small.zip"] = Answer(ARCHIVE, etag='"1"', drops=[70_000, 0, 0, 0, 0, 0])
    url = f"http://me:hidden@{host}/small.zip?token=hidden"
    assert main(["ml-latest-small", str(tmp_path), "--yes", "--url", url]) == 2
    assert "hidden" not in one_error_line(capsys)
    assert "hidden" not in (tmp_path / "ml-latest-small.zip.part.state").read_text()
    assert site.log[-1].path == "/small.zip?token=hidden"


# --- the disk


def test_not_enough_room_is_told_before_anything_is_written(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.answers["/small.zip"] = Answer(b"PK", headers={"Content-Length": str(10**18)})
    assert small(site, tmp_path) == 2
    assert f"needs {10**18} more bytes" in one_error_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ml-latest-small.zip.part").symlink_to("/dev/full")
    site.answers["/small.zip"] = Answer(ARCHIVE)
    assert small(site, tmp_path) == 2
    assert one_error_line(capsys) == f"error: {tmp_path}: No space left on device"
    assert len(site.log) == 1  # no use in trying again


def test_a_folder_that_cannot_be_made(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert small(site, tmp_path / "file" / "data") == 2
    assert "Not a directory" in one_error_line(capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    site.answers["/small.zip"] = Answer(ARCHIVE)
    assert small(site, tmp_path) == 2
    assert "Permission denied" in one_error_line(capsys)


# --- archives


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def encrypted(content: bytes) -> bytes:
    """The same archive with the flag of encryption set in its directory."""
    place = content.rindex(b"PK\x01\x02") + 8
    return content[:place] + bytes([content[place] | 1]) + content[place + 1 :]


EVIL = {
    "parent": zip_of(("ml/a", b"a"), ("../evil", b"x")),
    "parent within": zip_of(("ml/a", b"a"), ("ml/../../evil", b"x")),
    "absolute": zip_of(("ml/a", b"a"), ("/tmp/evil", b"x")),
    "drive": zip_of(("ml/a", b"a"), ("C:/evil", b"x")),
    "backslash": zip_of(("ml/a", b"a"), ("..\\evil", b"x")),
    "dot": zip_of(("ml/a", b"a"), ("./evil", b"x")),
    "link": zip_of((link("ml/a"), b"/etc"), ("ml/a/evil", b"x")),
    "bomb": zip_of(("ml/a", bytes(2_000_000))),
    "many": zip_of(*((f"ml/{i}", b"") for i in range(10_001))),
    "encrypted": encrypted(zip_of(("ml/a", b"a"))),
}
SAYS = {
    "link": "is a link",
    "bomb": "2000000 bytes, more than",
    "many": "10001 members",
    "encrypted": "encrypted",
}


@pytest.mark.parametrize("kind", EVIL)
def test_an_evil_archive_is_refused_whole(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "in" / "here"
    folder.mkdir(parents=True)
    (folder / "x.zip").write_bytes(EVIL[kind])
    with pytest.raises(UserError, match=SAYS.get(kind, "points outside")) as caught:
        unpack(folder / "x.zip", folder, max_bytes=1_000_000)
    assert "\n" not in str(caught.value)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "in",
        "in/here",
        "in/here/x.zip.bad",
    ]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(zip_of(("ml/a", b"a"), ("ml/a", b"b")))
    with pytest.raises(UserError, match="same name"):
        unpack(tmp_path / "x.zip", tmp_path)


def test_a_member_that_is_larger_than_it_says(tmp_path: Path) -> None:
    """2 MB declared as 10 bytes: no more than those come out, and the CRC betrays it."""
    size = (2_000_000).to_bytes(4, "little")
    content = zip_of(("ml/a", bytes(2_000_000)))
    assert content.count(size) == 2
    (tmp_path / "x.zip").write_bytes(content.replace(size, (10).to_bytes(4, "little")))
    with pytest.raises(UserError, match="CRC"):
        unpack(tmp_path / "x.zip", tmp_path, max_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip.bad"]


def test_an_evil_archive_by_way_of_the_command(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.answers["/small.zip"] = Answer(EVIL["parent"])
    assert small(site, tmp_path / "data") == 2
    assert "points outside" in one_error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_damaged_archives_are_refused_in_one_line(tmp_path: Path) -> None:
    """Any change of a few bytes either is seen, or leaves an archive that unpacks to the declared files."""
    rng = random.Random(1)
    good = zip_of(("ml/a.csv", b"1,2\n" * 50), ("ml/b.csv", b"3,4\n" * 50))
    refused = 0
    for i in range(400):
        content = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "x.zip").write_bytes(bytes(content[: rng.choice([len(good), rng.randrange(len(good))])]))
        try:
            unpack(folder / "x.zip", folder)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
            assert [path.name for path in folder.iterdir()] == ["x.zip.bad"]
    assert refused > 200


def test_unpacking_leaves_what_is_there_alone(tmp_path: Path) -> None:
    """Complete: left alone. Something else: refused, the archive kept. Missing: unpacked again."""
    (tmp_path / "x.zip").write_bytes(zip_of(("ml/a", b"abc"), ("ml/sub/b", b"de"), ("readme", b"f")))
    assert unpack(tmp_path / "x.zip", tmp_path) == tmp_path
    (tmp_path / "ml" / "mine").write_text("kept")
    assert unpack(tmp_path / "x.zip", tmp_path) == tmp_path
    assert (tmp_path / "ml" / "mine").read_text() == "kept"
    (tmp_path / "ml" / "a").write_text("abcd")
    with pytest.raises(UserError, match="move it away"):
        unpack(tmp_path / "x.zip", tmp_path)
    assert (tmp_path / "ml" / "a").read_text() == "abcd"
    assert (tmp_path / "x.zip").exists() and not (tmp_path / "x.zip.unpacking").exists()
    shutil.rmtree(tmp_path / "ml")
    unpack(tmp_path / "x.zip", tmp_path)
    assert (tmp_path / "ml" / "sub" / "b").read_text() == "de"


def test_an_unpacking_that_was_killed_is_done_again(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(zip_of(("ml/a", b"abc")))
    (tmp_path / "x.zip.unpacking" / "ml").mkdir(parents=True)
    (tmp_path / "x.zip.unpacking" / "ml" / "a").write_text("a")
    (tmp_path / "x.zip.unpacking" / "ml" / "of another archive").write_text("")
    assert unpack(tmp_path / "x.zip", tmp_path) == tmp_path / "ml"
    assert (tmp_path / "ml" / "a").read_text() == "abc"
    assert [path.name for path in (tmp_path / "ml").iterdir()] == ["a"]
    assert not (tmp_path / "x.zip.unpacking").exists()


# --- the user


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ml1m", "d", "--yes"], "did you mean ml-1m"),
        (["netflix", "d", "--yes"], "--list prints all names"),
        (["ml-1m", "s3://bucket/d", "--yes"], "not a local folder"),
        (["ml-1m", "d", "--yes", "--url", "ftp://host/ml-1m.zip"], "not an http or https address"),
        (["ml-1m", "d", "--yes", "--md5", "123"], "32 hexadecimal digits"),
        (["ml-1m", "d", "--yes", "--sha256", "g" * 64], "64 hexadecimal digits"),
        (["amazon2018-books", "d", "--yes", "--url", "http://host/x"], "Books_5.json.gz, meta_Books.json.gz"),
        (["ml-1m", "d", "--yes", "--url", "http://[/x.zip"], "http://[/x.zip"),
    ],
)  # fmt: skip
def test_mistakes_cost_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert says in one_error_line(capsys)


def test_no_name_or_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["ml-1m"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "NAME and FOLDER" in capsys.readouterr().err


def command(site: Site, folder: Path, *more: str) -> list[str]:
    name = ["ml-latest-small", str(folder), "--url", f"{site.url}/small.zip", *more]
    return [sys.executable, "-m", "dpo4rec_ray", "download", *name]


def test_without_a_terminal_the_terms_cannot_be_accepted(site: Site, tmp_path: Path) -> None:
    done = subprocess.run(
        command(site, tmp_path), cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: there is no terminal to ask for consent; add --yes"
    )
    assert done.stdout == "" and site.log == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answer", ["yes", " YES ", "no", "y", "", None])
def test_the_terms_are_asked_on_a_terminal(site: Site, tmp_path: Path, answer: str | None) -> None:
    """None: the user ends the input (Ctrl-D)."""
    site.answers["/small.zip"] = Answer(ARCHIVE)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(site, tmp_path), cwd=ROOT, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    os.write(ours, b"\x04" if answer is None else f"{answer}\n".encode())
    _, printed = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert 'Type "yes"' in printed
    if answer in ("yes", " YES "):
        assert process.returncode == 0, printed
        assert (tmp_path / "ml-latest-small" / "noise.bin").read_bytes() == NOISE
    else:
        assert process.returncode == 2
        assert printed.splitlines()[-1].endswith("the terms were not accepted; nothing was downloaded")
        assert site.log == [] and list(tmp_path.iterdir()) == []


def test_an_interrupt_keeps_what_came(site: Site, tmp_path: Path) -> None:
    site.answers["/small.zip"] = Answer(ARCHIVE, etag='"1"', slow_after=200_000)
    process = subprocess.Popen(command(site, tmp_path, "--yes"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "ml-latest-small.zip.part"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size > 0):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.splitlines()[-1] == "interrupted; run the same command again to continue"
    assert "Traceback" not in printed
    assert part.read_bytes() == ARCHIVE[: part.stat().st_size]
    kept = part.stat().st_size
    site.answers["/small.zip"] = Answer(ARCHIVE, etag='"1"')
    assert small(site, tmp_path, "--sha256", sha256(ARCHIVE)) == 0
    assert site.asked("/small.zip")[-1].sent == len(ARCHIVE) - kept
