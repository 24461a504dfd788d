"""Whether all nodes see the same folder: a file written here has to be there on each of them, and theirs here."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from pathlib import Path

from dpo4rec_ray.workers.nodes import ask_each_node


def probe(folder: str | Path) -> dict[str, str]:
    """The nodes that cannot work in a folder that this process has made: address -> why."""
    here = Path(folder).absolute() / f".probe-{uuid.uuid4().hex}"
    here.mkdir()
    try:
        (here / "driver").write_text(here.name)
        answers = ask_each_node(_look, str(here), here.name)
        return {node: why for node, why in answers.items() if why}
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(here)


def _look(folder: str, token: str) -> str:
    """On a node: "" if the driver's file is there and another can be written beside it."""
    here = Path(folder)
    try:
        if (here / "driver").read_text() != token:
            return "see another folder there"
        (here / uuid.uuid4().hex).write_text(token)
    except FileNotFoundError:
        return "do not see it"
    except OSError as error:
        return f"cannot write into it ({error.strerror})"
    return ""
