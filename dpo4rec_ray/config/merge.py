"""Merging of nested tables: fragments over recipes, a user's DeepSpeed file over the config that the recipe makes."""

from __future__ import annotations

from typing import Any


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
