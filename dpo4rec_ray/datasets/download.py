"""Fetch a public dataset: python -m dpo4rec_ray.datasets.download NAME FOLDER   (--list: the names).

Shows the publisher's terms and asks for consent, goes on where an earlier download broke off, checks size and checksum,
and unpacks. A file or folder gets its name only when it is complete, so what has its name need not be fetched again.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import os
import re
import shutil
import stat
import sys
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3
from tqdm import tqdm

from dpo4rec_ray.datasets.publishers import DATASETS, Dataset, RemoteFile, key_of
from dpo4rec_ray.errors import UserError

CHUNK_BYTES = 2**20
TIMEOUT_S = (10, 60)  # to connect, between two reads
ATTEMPTS = 5  # in a row that bring nothing new
BACKOFF_S = 1.0  # before the second attempt, doubled before each further one up to MAX_BACKOFF_S
MAX_BACKOFF_S = 30.0
MAX_UNPACKED_BYTES = 4 * 2**30  # the largest archive, ml-25m, holds 1.1 GiB
MAX_MEMBERS = 10_000
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_FIRST_BYTES = {".zip": b"PK", ".gz": b"\x1f\x8b", ".jsonl": b"{"}
_OVERRIDES = {  # option -> its form, and the form in words
    "url": (r"https?://([^/\s\[\]]+|\[[0-9a-fA-F:.]+\](:\d+)?)(/\S*)?", "an http or https address"),
    "md5": ("[0-9a-fA-F]{32}", "32 hexadecimal digits"),
    "sha256": ("[0-9a-fA-F]{64}", "64 hexadecimal digits"),
}


class _Dropped(Exception):
    """An attempt that failed in a way that may pass."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 with one line for what the user can mend, 130 when interrupted."""
    options = _parse(arguments)
    try:
        _run(options)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from here")
        return 130
    except UserError as error:
        _say(f"error: {error}")
        return 2
    except OSError as error:
        _say(f"error: {error.filename or options.folder}: {error.strerror or error}")
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dpo4rec_ray.datasets.download", description="Fetch a public dataset and unpack it."
    )
    parser.add_argument("name", nargs="?", help="a dataset, see --list")
    parser.add_argument("folder", nargs="?", help="where to put it; made when it is missing")
    parser.add_argument("--list", action="store_true", help="print the names and where their terms stand")
    parser.add_argument("--yes", action="store_true", help="accept the terms without being asked")
    parser.add_argument(
        "--url", action="append", default=[], help="fetch from here instead; once per file of the dataset"
    )
    sums = parser.add_mutually_exclusive_group()
    for option in ("--md5", "--sha256"):
        sums.add_argument(
            option, action="append", default=[], metavar="HEX", help="expect this; once per file"
        )
    options = parser.parse_args(arguments)
    if not options.list and not options.folder:
        parser.error("NAME and FOLDER are needed, or --list")
    return options


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(options: argparse.Namespace) -> None:
    if options.list:
        for name, dataset in DATASETS.items():
            print(f"{name:<42}{dataset.link}")
        return
    if key_of(options.name) not in DATASETS:
        near = difflib.get_close_matches(key_of(options.name), DATASETS, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"dataset {options.name!r} is unknown; {hint}--list prints all names")
    dataset = DATASETS[key_of(options.name)]
    files = _overridden(dataset.files, options)
    if "://" in options.folder:
        raise UserError(f"{options.folder!r} is not a local folder; download to one and copy it there")
    folder = Path(options.folder)
    missing: list[RemoteFile] = []
    for file in files:
        path = folder / file.name
        if not path.exists():
            missing.append(file)
        elif file.checksum:
            _verify(path, path, file.checksum)
    if missing:
        _agree(dataset, options.yes)
        folder.mkdir(parents=True, exist_ok=True)
        with requests.Session() as session:
            # A server that packs the answer would change the bytes that sizes, ranges and checksums speak of.
            session.headers.update({"Accept-Encoding": "identity", "User-Agent": "dpo4rec-ray"})
            for file in missing:
                fetch(session, file, folder)
    else:
        _say(f"{options.name} is complete already")
    raw_dir = folder
    for file in files:
        if file.name.endswith(".zip"):
            raw_dir = unpack(folder / file.name, folder)
    print(f"data.raw_dir={raw_dir.resolve()}")


def _overridden(files: tuple[RemoteFile, ...], options: argparse.Namespace) -> tuple[RemoteFile, ...]:
    """The files with what --url, --md5 and --sha256 say instead, one value per file."""
    for option, (form, what) in _OVERRIDES.items():
        values = getattr(options, option)
        for value in values:
            if not re.fullmatch(form, value):
                raise UserError(f"--{option} {value!r} is not {what}")
        if values and len(values) != len(files):
            names = ", ".join(file.name for file in files)
            raise UserError(
                f"--{option} is given {len(values)} times; give one for each of, in order: {names}"
            )
        for place, value in enumerate(values):
            change = {"url": value} if option == "url" else {"checksum": f"{option}:{value.lower()}"}
            files = (*files[:place], replace(files[place], **change), *files[place + 1 :])
    return files


def _agree(dataset: Dataset, yes: bool) -> None:
    _say(f"{dataset.terms}. In full: {dataset.link}")
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise UserError("there is no terminal to ask for consent; add --yes if you accept the terms")
    print('Type "yes" to accept these terms: ', end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() != "yes":
        raise UserError("the terms were not accepted; nothing was downloaded")


def fetch(session: requests.Session, file: RemoteFile, folder: Path) -> Path:
    """Download one file to folder/name, going on from folder/name.part where there is one.

    Raises:
        UserError: the server refuses, keeps breaking off, or sent something else than was expected; in the last case
            what came is set aside as name.bad.
        OSError: the disk is full or cannot be written.
    """
    path, part = folder / file.name, folder / f"{file.name}.part"
    published = _receive(session, file, part)
    checksum = file.checksum or published or _companion(session, file.url)
    _verify(part, path, checksum)
    os.replace(part, path)
    _state(part).unlink(missing_ok=True)
    return path


def _receive(session: requests.Session, file: RemoteFile, part: Path) -> str:
    """Bring `part` to its full size; the checksum that the server named, or ""."""
    failures, furthest = 0, _size(part)
    while True:
        try:
            return _attempt(session, file, part)
        except _Dropped as error:
            # Only bytes beyond the furthest point count: a server that cannot resume must not be asked for ever.
            failures = 0 if _size(part) > furthest else failures + 1
            furthest = max(furthest, _size(part))
            if failures >= ATTEMPTS:
                raise UserError(
                    f"{_shown(file.url)}: {error}, {failures} times in a row; {_size(part)} bytes are kept, the same "
                    "command goes on from there"
                ) from error
            wait_s = min(BACKOFF_S * 2**failures, MAX_BACKOFF_S)
            _say(f"{file.name}: {error}; trying again in {wait_s:.0f} s")
            time.sleep(wait_s)


def _attempt(session: requests.Session, file: RemoteFile, part: Path) -> str:
    """One request. Appends to `part` when the server goes on with the same file, otherwise starts it afresh."""
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
        _say(f"{file.name}: starting afresh: the file has changed, or the server cannot resume")
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
        # read1 hands over what has come: nothing of a broken connection is lost. Raw: a .gz stays a .gz.
        while chunk := response.raw.read1(CHUNK_BYTES, decode_content=False):
            out.write(chunk)
            bar.update(len(chunk))
        out.flush()
        os.fsync(out.fileno())  # the name that follows says that all of it is there


def _resume_point(part: Path, url: str) -> tuple[int, str]:
    """Bytes at hand, and what identifies the file they came from; (0, "") when it cannot be told."""
    try:
        source, validator = _state(part).read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, ValueError):
        return 0, ""
    return (_size(part), validator) if validator and source == _shown(url) else (0, "")


def _validator(response: requests.Response) -> str:
    """What If-Range may carry: a strong ETag, else the time of the last change."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.state")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _shown(url: str) -> str:
    """The address without what may be secret in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _cause(error: Exception) -> str:
    """What went wrong, without the request around it that requests adds."""
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


def _verify(at: Path, path: Path, checksum: str) -> None:
    """Compare the file at `at`, to be named `path`, with its checksum; set it aside when it is something else."""
    with at.open("rb") as file:
        first = file.read(16)
        expected = _FIRST_BYTES.get(path.suffix, b"")
        if not first.startswith(expected):
            _set_aside(at, path)
            raise UserError(
                f"{path}: what came is not a {path.suffix} file, it begins with {first!r}; it is kept as {path.name}.bad, "
                "the same command starts afresh"
            )
        file.seek(0)
        algorithm, _, wanted = (checksum or "sha256:").partition(":")
        found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    if not wanted:
        _say(f"{path.name}: no checksum was published; what came has sha256 {found}")
    elif found != wanted:
        _set_aside(at, path)
        raise UserError(
            f"{path}: {algorithm} is {found}, expected {wanted}; it is kept as {path.name}.bad, the same command starts "
            "afresh"
        )


def _set_aside(at: Path, path: Path) -> None:
    os.replace(at, path.with_name(f"{path.name}.bad"))
    _state(at).unlink(missing_ok=True)


def unpack(archive: Path, folder: Path, max_bytes: int = MAX_UNPACKED_BYTES) -> Path:
    """Unpack a zip into `folder`; what is there in full already is left alone, nothing is overwritten.

    Returns:
        The one folder that the archive holds, or `folder` when it holds several things.

    Raises:
        UserError: the archive is damaged or unsafe (it is set aside as name.bad), or something else is in the way.
        OSError: the disk is full or cannot be written.
    """
    fresh = folder / f"{archive.name}.unpacking"
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = _checked_members(zipped, max_bytes)
            tops: dict[str, list[zipfile.ZipInfo]] = {}
            for member in members:
                tops.setdefault(member.filename.split("/")[0], []).append(member)
            todo = [top for top, inside in tops.items() if not all(_is_unpacked(m, folder) for m in inside)]
            for top in todo:
                if os.path.lexists(folder / top):
                    raise UserError(
                        f"{folder / top} is there already and is not what {archive.name} holds; move it away and run "
                        "the same command again"
                    )
            shutil.rmtree(fresh, ignore_errors=True)
            for top in todo:
                # Never more than the declared bytes come out of a member, and its CRC is compared.
                zipped.extractall(fresh, tops[top])
            for top in todo:
                os.rename(fresh / top, folder / top)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        _set_aside(archive, archive)
        raise UserError(
            f"{archive} is damaged or unsafe: {error}; it is kept as {archive.name}.bad, nothing was unpacked"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    only = folder / next(iter(tops)) if len(tops) == 1 else folder
    return only if only.is_dir() else folder


def _is_unpacked(member: zipfile.ZipInfo, folder: Path) -> bool:
    path = folder / member.filename
    return path.is_dir() if member.is_dir() else path.is_file() and _size(path) == member.file_size


def _checked_members(zipped: zipfile.ZipFile, max_bytes: int) -> list[zipfile.ZipInfo]:
    """The members, all of them ordinary files and folders below the archive's root; else BadZipFile."""
    members = zipped.infolist()
    names = [member.filename.removesuffix("/") for member in members]
    if len(members) > MAX_MEMBERS:
        raise zipfile.BadZipFile(f"it has {len(members)} members, more than {MAX_MEMBERS}")
    if len(set(names)) < len(names):
        raise zipfile.BadZipFile("two of its members have the same name")
    total = sum(member.file_size for member in members)
    if total > max_bytes:
        raise zipfile.BadZipFile(f"unpacked it would be {total} bytes, more than {max_bytes}")
    for member, name in zip(members, names, strict=True):
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise zipfile.BadZipFile(f"its member {name!r} is a link or a device")
        outside = any(piece in ("", ".", "..") for piece in name.split("/"))
        if outside or "\\" in name or re.match("[A-Za-z]:", name):
            raise zipfile.BadZipFile(f"its member {name!r} points outside the folder")
        if member.flag_bits & 1:
            raise zipfile.BadZipFile(f"its member {name!r} is encrypted")
        if member.header_offset < 0:  # zipfile would seek there
            raise zipfile.BadZipFile(f"its member {name!r} begins before the archive")
    return members


if __name__ == "__main__":
    sys.exit(main())
