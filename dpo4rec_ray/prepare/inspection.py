"""The recipe's data source: its raw files are looked at once per run, and what was found is handed on.

Looking means to list a folder and to read headers, which takes seconds where the files are far away. The checks look
first, then the identity of the stage needs the files, then the stage itself.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from dpo4rec_ray.config import Config
from dpo4rec_ray.datasets import Source, load_source
from dpo4rec_ray.datasets.files import without_query
from dpo4rec_ray.store.artifacts import RunDir

# A table may have thousands of files.
MAX_NAMES = 20
# The last answer of `inspect_source` until the stage prepare has used it.
_found: list[tuple[tuple[object, ...], Source]] = []


def inspect_source(config: Config) -> Source:
    """Look at the raw files now. No event is read.

    Raises:
        UserError: as `load_source`.
    """
    _found[:] = [(_sections(config), load_source(config))]
    return _found[0][1]


def source_of(config: Config) -> Source:
    """What `inspect_source` found for the same sections, or a look at the files now."""
    return _found[0][1] if _found and _found[0][0] == _sections(config) else inspect_source(config)


def take_source(config: Config) -> Source:
    """`source_of` for the stage prepare. The files may change later, so the next run looks at them again."""
    source = source_of(config)
    _found.clear()
    return source


def files_of_run(config: Config, store: RunDir) -> list[str]:
    """Names of the files of events and users that the run's data were prepared from."""
    stats = store.require("lists").stats
    # Data prepared by an older version does not name its files.
    return stats["files"] if "files" in stats else file_names(source_of(config))


def file_names(source: Source) -> list[str]:
    """Names of the first files of events and users, without folders and queries, which may hold secrets."""
    files = [file for file in (*source.events, *source.users) if file.kind != "memory"]
    return [PurePosixPath(without_query(file.path)).name for file in files[:MAX_NAMES]]


def file_notes(source: Source) -> list[str]:
    """What was found out about the files, once for files with the same note."""
    names: dict[str, list[str]] = {}
    for file in (*source.events, *source.items, *source.users, *source.lists):
        if file.note:
            names.setdefault(file.note, []).append(PurePosixPath(without_query(file.path)).name)
    return [
        f"{', '.join(dict.fromkeys(found[:MAX_NAMES]))}{', ...' if len(found) > MAX_NAMES else ''}: {note}"
        for note, found in names.items()
    ]


def _sections(config: Config) -> tuple[object, ...]:
    """The sections that say what the data is, and the seed of the sample world's users."""
    return config.data, config.table, config.logged, config.sample, config.run.seed
