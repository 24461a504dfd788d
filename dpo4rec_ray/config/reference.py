"""Every key of a recipe: kind, default, unit and meaning, read from the sections themselves."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from dpo4rec_ray.config.recipe import Config
from dpo4rec_ray.config.section import Section
from dpo4rec_ray.errors import UserError, nearest

KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Any: "anything",
}
NUMBERS = (KINDS[int], KINDS[float])
# Unit -> what the name of a key, or the meaning of a number, looks like. The first that fits is taken.
UNITS = {
    "seconds": r"_s$|^Seconds ",
    "GiB": r"_gib$|^GiB ",
    "MiB": r"_mib$|^MiB ",
    "bytes": r"_bytes$|\bbytes\b",
    "share": r"_frac$|_fraction$|^(Largest )?[Ss]hare |_utilization$|^top_p$",
    "tokens": r"_tokens$|^Most tokens |^Tokens ",
    "CPUs": r"^CPUs |^cpus_per_",
    "GPUs": r"^GPUs |^gpus_per_",
}


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        kind: in plain words: what it holds, its choices or its bounds.
        default: as TOML writes it.
        unit: "" where the value has none, or is counted in what the meaning names.
        placement: whether it only says where the work runs, so that complete stages survive a change of it.
    """

    section: str
    name: str
    kind: str
    default: str
    unit: str
    meaning: str
    placement: bool

    @property
    def path(self) -> str:
        """As an override names it: section.key."""
        return f"{self.section}.{self.name}"


def sections() -> dict[str, type[Section]]:
    """The sections of a recipe by name, in its order."""
    return {name: _section_of(field) for name, field in Config.model_fields.items()}


def about(section: str) -> str:
    """What a section is for."""
    return " ".join(inspect.cleandoc(sections()[section].__doc__ or "").split())


def keys(wanted: str = "") -> list[Key]:
    """The keys of the whole recipe, of a section ("data"), one key ("data.user_core"), or all keys of a name ("user_core").

    Raises:
        UserError: there is no such section or key; the nearest one is named.
    """
    section, dot, name = wanted.partition(".")
    if wanted and section not in sections():
        if named := [key for key in _all_keys() if key.name == wanted]:
            return named  # without their sections
        raise UserError(f"{wanted}: a recipe has no section {section!r}{nearest(section, list(sections()))}")
    found = [key for key in _all_keys() if section in ("", key.section) and name in ("", key.name)]
    if dot and (not name or not found):
        names = list(sections()[section].model_fields)
        raise UserError(f"{wanted}: [{section}] has no key {name!r}{nearest(name, names)}")
    return found


def as_json(found: Sequence[Key]) -> str:
    """The keys as a JSON list of objects."""
    return json.dumps([dataclasses.asdict(key) for key in found], indent=1, ensure_ascii=False)


def as_markdown(found: Sequence[Key]) -> str:
    """A heading and a table per section."""
    lines: list[str] = []
    section = ""
    for key in found:
        if key.section != section:
            section = key.section
            lines += [
                f"\n## [{section}]",
                f"{about(section)}\n",
                "| key | value | default | meaning |",
                "|---|---|---|---|",
            ]
        cells = (f"`{key.name}`", described(key), f"`{key.default}`", key.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines).strip() + "\n"


def described(key: Key) -> str:
    """Kind and unit of a key."""
    return f"{key.kind}, {key.unit}" if key.unit else key.kind


def _all_keys() -> Iterator[Key]:
    for section, kind in sections().items():
        for name, field in kind.model_fields.items():
            meaning = " ".join((field.description or "").split())
            yield Key(
                section=section,
                name=name,
                kind=_kind(field),
                default=_toml(field.get_default(call_default_factory=True)),
                unit=_unit(name, meaning) if _in_words(field.annotation) in NUMBERS else "",
                meaning=meaning,
                placement=name in kind.placement,
            )


def _section_of(field: FieldInfo) -> type[Section]:
    kind = field.annotation
    assert isinstance(kind, type) and issubclass(kind, Section)
    return kind


def _kind(field: FieldInfo) -> str:
    words = _in_words(field.annotation)
    bounds = _bounds(field.metadata)
    return f"{words}, {bounds}" if bounds else words


def _in_words(annotation: Any) -> str:
    """A type in plain words: `tuple[str, ...]` is "list of text"."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        *first, last = map(_toml, inner)
        return f"{', '.join(first)} or {last}" if first else last
    if origin is tuple:
        return f"list of {_in_words(inner[0])}"
    if origin is dict:
        return f"table of {_in_words(inner[1])}"
    if origin in (Union, UnionType):
        return ", or ".join(map(_in_words, inner))
    if origin is Annotated:
        limits = [limit for one in inner[1:] if isinstance(one, FieldInfo) for limit in one.metadata]
        return ", ".join(filter(None, (_in_words(inner[0]), _bounds(limits))))
    return KINDS[annotation]


def _bounds(limits: Sequence[Any]) -> str:
    """The limits of a number: "from 0 to 1", "above 0 and below 1"."""
    found: list[str] = []
    for limit in limits:
        if isinstance(limit, Ge):
            found.append(f"from {limit.ge}")
        elif isinstance(limit, Gt):
            found.append(f"above {limit.gt}")
        elif isinstance(limit, Le):
            found.append(f"to {limit.le}")
        elif isinstance(limit, Lt):
            found.append(f"and below {limit.lt}")
    return " ".join(found)


def _unit(name: str, meaning: str) -> str:
    fits = (unit for unit, form in UNITS.items() if re.search(form, name) or re.search(form, meaning))
    return next(fits, "")


def _toml(value: Any) -> str:
    """A default as TOML writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(one) for one in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)
