"""The bearer tokens of serving.token_file. Without Ray, so that a command can read them before it starts anything."""

from __future__ import annotations

from pathlib import Path

from dpo4rec_ray.errors import UserError


def read_tokens(file: str) -> frozenset[str]:
    """Bearer tokens of a file, one per line; none if `file` is "".

    Raises:
        UserError: the file cannot be read, or has no token.
    """
    if not file:
        return frozenset()
    name = f"serving.token_file {file}"
    try:
        tokens = frozenset(line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines())
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}; name a file with one token per line") from None
    except UnicodeDecodeError:
        raise UserError(f"{name}: not a text file; name a file with one token per line") from None
    if not tokens - {""}:
        raise UserError(f"{name}: no token in it; write one per line")
    if not all(token.isascii() for token in tokens):
        raise UserError(f"{name}: a token has characters outside ASCII, which HTTP headers cannot carry")
    return tokens - {""}
