"""A node's own disk: libraries that write temporary files there fail with other words when it is full."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Iterator

from dpo4rec_ray.errors import UserError

LEAST_FREE_MIB = 16


@contextlib.contextmanager
def full_disk_named(what: str) -> Iterator[None]:
    """Whatever fails in the block while this node's disk has no room is told as that.

    what: what the block does, such as "start an engine".

    Raises:
        UserError: in the place of any other exception, where the temporary folder has less than LEAST_FREE_MIB.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free / 2**20
        if free >= LEAST_FREE_MIB:
            raise
        raise UserError(
            f"node {socket.gethostname()} could not {what}: its disk is full ({free:.0f} MiB left in {folder}); free some or "
            "take the node away, and run the same command again"
        ) from error
