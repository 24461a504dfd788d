"""One file over HTTP: continued where an earlier attempt stopped, tried again, and compared with its checksum."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3
from tqdm import tqdm

from dpo4rec_ray.datasets.publishers import RemoteFile
from dpo4rec_ray.errors import UserError

CHUNK_BYTES = 2**20
# Seconds to connect, and between two reads.
TIMEOUT_S = (10, 60)
# Attempts in a row that bring no new byte.
ATTEMPTS = 5
# Before the second attempt, doubled before each further one up to MAX_BACKOFF_S.
BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_FIRST_BYTES = {".zip": b"PK", ".gz": b"\x1f\x8b", ".jsonl": b"{"}


class _Dropped(Exception):
    """An attempt that failed in a way that may pass."""


def tell(text: str) -> None:
    """One line for the person at the terminal; standard output holds the result alone."""
    print(text, file=sys.stderr, flush=True)


def fetch(session: requests.Session, file: RemoteFile, folder: Path) -> Path:
    """Download one file to folder/name; continue folder/name.part where there is one.

    Raises:
        UserError: the server refuses, keeps breaking off, or sent something else than expected, which is then kept as
            name.bad.
        OSError: the disk is full or cannot be written.
    """
    path, part = folder / file.name, folder / f"{file.name}.part"
    published = _receive(session, file, part)
    checksum = file.checksum or published or _companion(session, file.url)
    verify(part, path, checksum)
    os.replace(part, path)
    _state(part).unlink(missing_ok=True)
    return path


def _receive(session: requests.Session, file: RemoteFile, part: Path) -> str:
    """Download until `part` has its full size; returns the checksum that the server named, or ""."""
    failures, furthest = 0, size_of(part)
    while True:
        try:
            return _attempt(session, file, part)
        except _Dropped as error:
            # Only bytes beyond the furthest point are progress: else a server that cannot resume would be asked forever.
            failures = 0 if size_of(part) > furthest else failures + 1
            furthest = max(furthest, size_of(part))
            if failures >= ATTEMPTS:
                raise UserError(
                    f"{_shown(file.url)}: {error}, {failures} times in a row; {size_of(part)} bytes are kept, run the same "
                    "command again to continue"
                ) from error
            wait_s = min(BACKOFF_S * 2**failures, MAX_BACKOFF_S)
            tell(f"{file.name}: {error}; trying again in {wait_s:.0f} s")
            time.sleep(wait_s)


def _attempt(session: requests.Session, file: RemoteFile, part: Path) -> str:
    """One request. Appends to `part` when the server continues the same file, and starts again when it does not."""
    start, validator = _resume_point(part, file.url)
    headers = {"Range": f"bytes={start}-", "If-Range": validator} if start else {}
    try:
        with session.get(file.url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
            hops = [*response.history, response]
            if file.url.startswith("https:") and not all(hop.url.startswith("https:") for hop in hops):
                raise UserError(f"{_shown(file.url)} redirects to an address without encryption")
            if response.status_code in _BUSY:
                raise _Dropped(f"the server answers {response.status_code}")
            if response.status_code not in ((200, 206, 416) if start else (200,)):
                raise UserError(
                    f"{_shown(response.url)} answers {response.status_code} {response.reason}; "
                    "name a mirror with --url"
                )
            _save(response, file, part, start, validator)
            etags = [hop.headers.get("X-Linked-Etag", "").strip('"') for hop in hops]
            return next((f"sha256:{etag}" for etag in etags if re.fullmatch("[0-9a-f]{64}", etag)), "")
    except (requests.exceptions.SSLError, requests.exceptions.InvalidURL) as error:
        raise UserError(f"{_shown(file.url)}: {type(error).__name__}: {_cause(error)}") from error
    except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
        raise _Dropped(f"no connection, or it broke ({_cause(error)})") from error
    except requests.RequestException as error:
        raise UserError(f"{_shown(file.url)}: {error}") from error


def _save(response: requests.Response, file: RemoteFile, part: Path, start: int, validator: str) -> None:
    content_range = response.headers.get("Content-Range", "")
    same_file = _validator(response) in ("", validator)
    if response.status_code == 416 and same_file and content_range == f"bytes */{start}":
        return  # nothing was left to send
    resumed = response.status_code == 206 and same_file and content_range.startswith(f"bytes {start}-")
    if response.status_code != 200 and not resumed:
        part.unlink(missing_ok=True)
        raise _Dropped("the file has changed on the server")
    if start and not resumed:
        tell(
            f"{file.name}: starting again from the first byte: the file has changed, or the server cannot resume"
        )
        start = 0
    length = response.headers.get("Content-Length", "")
    total = start + int(length) if length.isdigit() else None
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - start > free:
        raise UserError(f"{part.parent}: {file.name} needs {total - start} more bytes, {free} are free")
    with (
        part.open("ab" if resumed else "wb") as out,
        tqdm(
            desc=file.name,
            total=total,
            initial=start,
            unit="B",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        ) as bar,
    ):
        if not resumed:
            _state(part).write_text(f"{_shown(file.url)}\n{_validator(response)}", encoding="utf-8")
        # read1 returns what has arrived, so a broken connection loses nothing. Raw: a .gz file stays compressed.
        while chunk := response.raw.read1(CHUNK_BYTES, decode_content=False):
            out.write(chunk)
            bar.update(len(chunk))
        out.flush()
        os.fsync(out.fileno())  # before the file gets the name that means complete


def _resume_point(part: Path, url: str) -> tuple[int, str]:
    """Bytes that are there, and what identifies the file they came from; (0, "") when that is not known."""
    try:
        source, validator = _state(part).read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, ValueError):
        return 0, ""
    return (size_of(part), validator) if validator and source == _shown(url) else (0, "")


def _validator(response: requests.Response) -> str:
    """What If-Range may carry: a strong ETag, else the time of the last change."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.state")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _shown(url: str) -> str:
    """The address without its user, password and query, which may be secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _cause(error: Exception) -> str:
    """What went wrong, without the description of the request that `requests` adds."""
    return str(getattr(error.args[0], "reason", error) if error.args else error)


def _companion(session: requests.Session, url: str) -> str:
    """The checksum in the publisher's URL.md5, or "". Its forms: "MD5 (NAME) = HEX", "HEX  NAME", "HEX"."""
    address = urlsplit(url)
    try:
        answer = session.get(address._replace(path=f"{address.path}.md5").geturl(), timeout=TIMEOUT_S)
    except requests.RequestException:
        return ""
    found = re.findall(r"\b[0-9a-fA-F]{32}\b", answer.text) if len(answer.content) < 1024 else []
    return f"md5:{found[0].lower()}" if answer.status_code == 200 and len(found) == 1 else ""


def verify(at: Path, path: Path, checksum: str) -> None:
    """Compare the file at `at`, to be named `path`, with its checksum; rename it to name.bad when they differ.

    Raises:
        UserError: the file begins with other bytes than its format has, or has another checksum.
    """
    with at.open("rb") as file:
        first = file.read(16)
        expected = _FIRST_BYTES.get(path.suffix, b"")
        if not first.startswith(expected):
            set_aside(at, path)
            raise UserError(
                f"{path}: what came is not a {path.suffix} file, it begins with {first!r}; it is kept as {path.name}.bad, "
                "run the same command again to download it anew"
            )
        file.seek(0)
        algorithm, _, wanted = (checksum or "sha256:").partition(":")
        found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    if not wanted:
        tell(f"{path.name}: no checksum was published; what came has sha256 {found}")
    elif found != wanted:
        set_aside(at, path)
        raise UserError(
            f"{path}: {algorithm} is {found}, expected {wanted}; it is kept as {path.name}.bad, run the same command again "
            "to download it anew"
        )


def set_aside(at: Path, path: Path) -> None:
    os.replace(at, path.with_name(f"{path.name}.bad"))
    _state(at).unlink(missing_ok=True)
