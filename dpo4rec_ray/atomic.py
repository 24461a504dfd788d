"""Files that get their names when they are complete."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_file(target: Path, *, synced: bool = False) -> Iterator[Path]:
    """Where to write what becomes `target` at the end; after an error nothing is left.

    synced: the content is on the disk before the name, which must not outlive it when a machine goes down.
    """
    temporary = target.with_suffix(f".tmp{os.getpid()}-{threading.get_ident()}")
    try:
        yield temporary
        if synced:
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
