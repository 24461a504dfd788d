"""Whether all nodes see the same folder: a file written here has to be there on each of them, and theirs can be written."""

from __future__ import annotations

import uuid

from dpo4rec_ray.errors import first_line
from dpo4rec_ray.storage.places import Place, place, remove, write_text
from dpo4rec_ray.workers.nodes import ask_each_node


def probe(folder: str | Place) -> dict[str, str]:
    """The nodes that cannot work in a folder in which this process can: address -> why."""
    token = uuid.uuid4().hex
    here = place(folder) / f".probe-{token}"
    here.mkdir(parents=True, exist_ok=True)
    try:
        write_text(here / "driver", token)
        answers = ask_each_node(_look, str(here), token)
        return {node: why for node, why in answers.items() if why}
    finally:
        remove(here)


def _look(folder: str, token: str) -> str:
    """On a node: "" if the driver's file is there and another can be written beside it."""
    try:
        here = place(folder)
        if (here / "driver").read_text() != token:
            return "see another folder there"
        write_text(here / uuid.uuid4().hex, token)
    except FileNotFoundError:
        return "do not see it"
    except Exception as error:  # each store has errors of its own
        return f"cannot write into it ({getattr(error, 'strerror', None) or first_line(error)[:200]})"
    return ""
