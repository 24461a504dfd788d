"""Downloads public datasets.

Shows the publisher's terms and asks for consent, continues an earlier download that was interrupted, checks size and
checksum, and unpacks. A file or folder gets its name only when it is complete, so what has its name is not fetched again.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from dataclasses import replace
from pathlib import Path

import requests

from dpo4rec_ray.datasets.archives import unpack
from dpo4rec_ray.datasets.fetch import fetch, tell, verify
from dpo4rec_ray.datasets.publishers import PUBLISHED, PublishedDataset, RemoteFile, key_of
from dpo4rec_ray.errors import UserError

# Option -> what its value must match, as a pattern and in words.
_OVERRIDES = {
    "url": (r"https?://([^/\s\[\]]+|\[[0-9a-fA-F:.]+\](:\d+)?)(/\S*)?", "an http or https address"),
    "md5": ("[0-9a-fA-F]{32}", "32 hexadecimal digits"),
    "sha256": ("[0-9a-fA-F]{64}", "64 hexadecimal digits"),
}


def download(options: argparse.Namespace) -> None:
    """What the options of `dpo4rec download` ask for (cli/download_dataset.py). Prints `data.raw_dir=FOLDER` for the recipe.

    Raises:
        UserError: an unknown name, terms that are not accepted, or a file that does not come or is not as published.
    """
    if options.list:
        for name, dataset in PUBLISHED.items():
            print(f"{name:<42}{dataset.link}")
        return
    if key_of(options.name) not in PUBLISHED:
        near = difflib.get_close_matches(key_of(options.name), PUBLISHED, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"dataset {options.name!r} is unknown; {hint}--list prints all names")
    dataset = PUBLISHED[key_of(options.name)]
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
            verify(path, path, file.checksum)
    if missing:
        _agree(dataset, options.yes)
        folder.mkdir(parents=True, exist_ok=True)
        with requests.Session() as session:
            # Sizes, ranges and checksums are those of the bytes as published: the server must not compress them.
            session.headers.update({"Accept-Encoding": "identity", "User-Agent": "dpo4rec-ray"})
            for file in missing:
                fetch(session, file, folder)
    else:
        tell(f"{options.name} is complete already")
    raw_dir = folder
    for file in files:
        if file.name.endswith(".zip"):
            raw_dir = unpack(folder / file.name, folder)
    print(f"data.raw_dir={raw_dir.resolve()}")


def _overridden(files: tuple[RemoteFile, ...], options: argparse.Namespace) -> tuple[RemoteFile, ...]:
    """The files with the values of --url, --md5 and --sha256 in place of their own, one value per file."""
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


def _agree(dataset: PublishedDataset, yes: bool) -> None:
    tell(f"{dataset.terms}. In full: {dataset.link}")
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise UserError("there is no terminal to ask for consent; add --yes if you accept the terms")
    print('Type "yes" to accept these terms: ', end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() != "yes":
        raise UserError("the terms were not accepted; nothing was downloaded")


if __name__ == "__main__":  # the former command
    print(
        "error: the command is now `dpo4rec download NAME FOLDER`; `--list` prints the names", file=sys.stderr
    )
    sys.exit(2)
