"""Reads recipes: TOML files, fragments over them, overrides over these. Names the nearest key where one is unknown."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from dpo4rec_ray.config.bundled_recipes import names, recipe_file
from dpo4rec_ray.config.recipe import Config
from dpo4rec_ray.config.section import Section, first_mistake, merged
from dpo4rec_ray.config.training import PolicySection
from dpo4rec_ray.errors import UserError, first_line, nearest
from dpo4rec_ray.storage.places import place

Table = dict[str, Any]  # of a TOML file
# Former keys and values -> what they are called now. A recipe is told the new name; the config.json of an old
# run folder or published version is read as if it had it.
RENAMED_KEYS = {
    **{("dpo", key): ("policy", key) for key in PolicySection.model_fields},
    ("dpo", "accumulation"): ("policy", "gradient_accumulation_steps"),
    ("bootstrap", "accumulation"): ("bootstrap", "gradient_accumulation_steps"),
    ("pair", "max_heldout_users"): ("policy", "max_heldout_users"),
    # The last one that an old run has holds: trackers of the policy's training.
    **{(section, "trackers"): ("run", "trackers") for section in ("bootstrap", "dpo", "policy")},
}
RENAMED_VALUES = {("llm", "lora_mode", "adapter"): "lora"}


def load_config(path: str | Path, changes: list[str] | None = None) -> Config:
    """Read a recipe, merge fragments over it in the order given, then apply overrides.

    Args:
        path: the recipe, a file or the name of a bundled one; the run is named after it, unless run.name is set.
        changes: fragments (names of TOML files, ending in .toml; tables are merged key by key) and overrides
            (`section.key=value`, or `section.key.key=value` inside a table).

    Raises:
        UserError: unreadable file, unknown key (the nearest known name is given), or a value out of range.
    """
    file = recipe_file(path)
    fragments = [text for text in changes or [] if is_fragment(text)]
    raw = _read_toml("recipe", file)
    for fragment in fragments:
        values = _read_toml("fragment", Path(fragment))
        _check_keys(values, where=f"fragment {fragment}")
        raw = merged(raw, values)
    for text in changes or []:
        if text not in fragments:
            _apply_override(raw, text)
    # After the overrides: run.name=$NAME of a variable that is not set would make run.root itself the run folder.
    run = raw.setdefault("run", {})
    if isinstance(run, dict) and run.get("name", "") == "":
        run["name"] = file.stem
    return _checked(raw, [], where=" with ".join([f"recipe {path}", *fragments]))


def read_config(folder: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings that a run folder was made with, and `section.key=value` over them.

    Raises:
        UserError: not a run folder, one of other code, or an override that does not fit.
    """
    file = place(folder) / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        why = "it holds no config.json" if place(folder).is_dir() else "there is no such folder"
        raise UserError(f"{folder}: not a run folder; {why}") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); run the recipe again") from None
    for (section, old), (now, new) in RENAMED_KEYS.items():
        if old in raw.get(section, {}):
            raw.setdefault(now, {})[new] = raw[section].pop(old)
    for (section, key, old), new in RENAMED_VALUES.items():
        if raw.get(section, {}).get(key) == old:
            raw[section][key] = new
    return _checked(raw, overrides, where=str(file))


def default_config(overrides: Sequence[str] = ()) -> Config:
    """The defaults, and `section.key=value` over them. Raises UserError if an override does not fit."""
    return _checked({}, overrides, where="the defaults")


def _checked(raw: dict[str, Any], overrides: Sequence[str], where: str) -> Config:
    for text in overrides:
        _apply_override(raw, text)
    _check_keys(raw, where)
    _take_in_template(raw.get("prompt", {}))
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {first_mistake(error)}; mend the recipe or the override") from None


def _take_in_template(prompt: Table) -> None:
    """Put the text of prompt.template_file into prompt.template: workers, versions and later runs need no file then."""
    name = prompt.pop("template_file", "")
    if not name:
        return
    if prompt.get("template"):
        raise UserError(f"prompt.template_file = {name!r}, but prompt.template is set too; set one of them")
    try:
        prompt["template"] = Path(name).expanduser().read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"prompt.template_file = {name!r}: cannot be read ({first_line(error)})") from None
    if not prompt["template"].strip():
        raise UserError(f"prompt.template_file = {name!r}: the file is empty")


def is_fragment(text: str) -> bool:
    """Whether an argument names a fragment; an override may end in .toml too."""
    return text.endswith(".toml") and not re.match(r"\w+\.[\w.]+=", text)


def _read_toml(what: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = f"; bundled ones go by name: {', '.join(names())}" if what == "recipe" else ""
        raise UserError(f"{what} {path}: cannot be read ({error.strerror}){hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path}: not valid TOML ({error})") from None


def _apply_override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    *tables, name = key.split(".")
    if not equals or not tables or not all([*tables, name]):
        raise UserError(
            f"override {text!r}: write it as section.key=value, for example generate.num_samples=4"
        )
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string: data.dataset=movielens
    target = raw
    for depth, table in enumerate(tables):
        below = target.setdefault(table, {})
        if not isinstance(below, dict):
            kind = "table" if depth else "section"
            raise UserError(
                f"override {text!r}: {'.'.join(tables[: depth + 1])!r} is not a {kind} of the recipe"
            )
        target = cast(Table, below)
    target[name] = parsed


def _check_keys(raw: dict[str, Any], where: str) -> None:
    """Name the nearest known key, which pydantic's own message does not."""
    sections = Config.model_fields
    for section, values in raw.items():
        if section not in sections:
            raise UserError(f"{where}: unknown section [{section}]{nearest(section, list(sections))}")
        if not isinstance(values, dict):
            raise UserError(f"{where}: [{section}] must be a section with keys, not {values!r}")
        kind = sections[section].annotation
        assert isinstance(kind, type) and issubclass(kind, Section)
        known = list(kind.model_fields)
        for key, value in values.items():
            if renamed := RENAMED_KEYS.get((section, key)):
                raise UserError(f"{where}: {section}.{key} is called {'.'.join(renamed)} now")
            if isinstance(value, str) and (renamed := RENAMED_VALUES.get((section, key, value))):
                raise UserError(f"{where}: {section}.{key} = {value!r} is called {renamed!r} now")
            if key not in known:
                raise UserError(f"{where}: unknown key {section}.{key}{nearest(key, known)}")
