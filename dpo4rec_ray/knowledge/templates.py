"""Templates of prompts: text with placeholders such as {history}, read strictly and filled with data that is not read again."""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from dpo4rec_ray.errors import UserError

_BRACES = "a brace that is text is written {{ or }}"


@dataclass(frozen=True)
class Template:
    """A template that was read.

    Attributes:
        lines: of each line its pieces: a text, and the name of the placeholder behind it ("": none).
        optional: placeholders that may be empty; a line with one that is gets left out.
    """

    lines: tuple[tuple[tuple[str, str], ...], ...]
    optional: frozenset[str]

    def fill(self, values: Mapping[str, str]) -> str:
        """The template with its placeholders' values, which may hold braces: they are put in and not looked at."""
        kept = [
            "".join(text + (values[name] if name else "") for text, name in line)
            for line in self.lines
            if all(values[name] for _, name in line if name in self.optional)
        ]
        return "\n".join(kept)

    @property
    def names(self) -> set[str]:
        """The placeholders that are used."""
        return {name for line in self.lines for _, name in line if name}


def read_template(
    key: str,
    text: str,
    known: Collection[str],
    *,
    one_of: Collection[str] = (),
    optional: Collection[str] = (),
) -> Template:
    """Read a template. key: the recipe's, for messages; one_of: placeholders of which at least one must be used.

    Raises:
        UserError: a placeholder that is not known, none of `one_of`, or a brace on its own.
    """
    listed = ", ".join(f"{{{name}}}" for name in known)
    lines = []
    for line in text.split("\n"):
        try:
            found = list(string.Formatter().parse(line))
        except ValueError as error:
            raise UserError(f"{key}: {line!r}: {error}; {_BRACES}") from None
        for _, name, form, conversion in found:
            if name is not None and (name not in known or form or conversion):
                shown = f"{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}"
                raise UserError(
                    f"{key}: {{{shown}}} is no placeholder that is known; known: {listed}; {_BRACES}"
                )
        lines.append(tuple((literal, name or "") for literal, name, _, _ in found))
    template = Template(tuple(lines), frozenset(optional))
    if one_of and not template.names & set(one_of):
        wanted = " or ".join(f"{{{name}}}" for name in one_of)
        raise UserError(
            f"{key} holds no {wanted}: everybody would be asked the same; put it in; known: {listed}"
        )
    return template
