"""What every section of a recipe shares, and the merging of nested tables."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

CONTAINER_FIRST = ("abfs", "abfss", "wasb", "wasbs")  # Azure's CONTAINER@ACCOUNT.dfs.core.windows.net


def _without_secrets(path: str) -> str:
    scheme, _, rest = path.partition("://")
    user = rest.partition("/")[0].rpartition("@")[0]
    if user and (":" in user or scheme not in CONTAINER_FIRST):
        raise ValueError(
            "keys do not belong into a URI; set them in the environment (AWS_ACCESS_KEY_ID, ...)"
        )
    return path


# A path, a URI such as s3://bucket/runs (storage/places.py), or a pattern of either. Settings are written into reports.
Folder = Annotated[str, AfterValidator(_without_secrets)]


class Section(BaseModel):
    """A section of a recipe: frozen, and an unknown key is an error. The string below a field says what it means."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, use_attribute_docstrings=True)
    # Keys that say where the work runs and cannot change its result: complete artifacts survive a change of them.
    placement: ClassVar[frozenset[str]] = frozenset()


def first_mistake(error: ValidationError) -> str:
    """Key, value and reason of the first of pydantic's complaints, on one line."""
    found = error.errors()
    first, place = found[0], found[0]["loc"]
    reason = first["msg"].removeprefix("Value error, ")
    # Of a key that takes values of several kinds there is a complaint for each kind.
    if place and _is_kind(place[-1]):
        place = place[:-1]
        said = [one["msg"] for one in found if one["loc"][:-1] == place and _is_kind(one["loc"][-1])]
        reason = ", or ".join([said[0], *(one.removeprefix("Input should be ") for one in said[1:])])
    key = ".".join(str(part) for part in place) or "recipe"
    value = first.get("input")
    # Without the keys or the password of a URI, which are what may be wrong with it.
    shown = "" if isinstance(value, dict) else " = " + re.sub("://[^/@]*@", "://...@", repr(value))
    return f"{key}{shown}: {reason}"


def _is_kind(part: int | str) -> bool:
    """Whether a part of pydantic's place names no key but a kind of values: "constrained-int", "literal['auto']"."""
    return isinstance(part, str) and (part in ("int", "float", "str", "bool") or not part.isidentifier())


def merged(base: dict[str, Any], over: dict[str, Any], *, unset: Any = None) -> dict[str, Any]:
    """`base` with the values of `over`; where both hold a table, these are merged in the same way.

    unset: a value in `over` that stands for "as in base".
    """
    found = dict(base)
    for key, value in over.items():
        mine = found.get(key)
        if isinstance(mine, dict) and isinstance(value, dict):
            found[key] = merged(mine, value, unset=unset)
        elif unset is None or value != unset:
            found[key] = value
    return found
