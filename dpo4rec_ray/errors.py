"""The one exception class that means "the user can fix this": commands print it as one line and exit with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in the input, the recipe or the machine's set-up. The message says what, where, the value and what to do."""


def first_line(error: BaseException) -> str:
    """Of an error's text; the name of its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint behind an unknown name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
