"""What an artifact depends on, and what of it is not as it was when the artifact was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dpo4rec_ray.store.schemas import SCHEMA_VERSION

if TYPE_CHECKING:
    from dpo4rec_ray.store.artifacts import Manifest

_CALLED = {"policy/0": "policy/0 (the base LLM or the source of texts)", "seed": "run.seed"}
_SHOWN = 40  # characters of a value


@dataclass(frozen=True)
class Dependencies:
    """Of one artifact. Its manifest keeps them.

    Attributes:
        fingerprint: hash of all of it; where it is the same, the artifact can be kept.
        inputs: "name/round" -> which production of that artifact was read.
        settings: values of the recipe by section, or by "section.key".
        outside: in words what lies outside run and recipe -> its identity.
        defaults: the settings' default values, as `settings`. A key that a later version added counts as its default in what an
            older version made: a new key's default has to keep things as they were.
        left_out: keys that do not count, as "section.key", though an older version may have counted them.
    """

    fingerprint: str
    inputs: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()

    def changes_since(self, made: Manifest) -> str:
        """What changed since an artifact was made, in words; "" where nothing did."""
        if made.fingerprint == self.fingerprint:
            return ""
        found = [f"changed input {_CALLED.get(name, name)}" for name in _differing(made.inputs, self.inputs)]
        if not made.settings:
            return ", ".join(found) or "recipe or input changed"
        now = by_key(self.settings)
        added = {key: value for key, value in by_key(self.defaults).items() if key in now}
        before = added | by_key(made.settings)
        before = {key: value for key, value in before.items() if key in now or key not in self.left_out}
        found += [
            f"changed key {_CALLED.get(key, key)} ({_short(before, key)} -> {_short(now, key)})"
            for key in _differing(before, now)
        ]
        found += [f"{name} changed" for name in _differing(made.outside, self.outside)]
        if made.schema_version != SCHEMA_VERSION:
            found.append("format of the artifacts changed")
        return ", ".join(found)


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        name for name in (now | before) if (name in before, before.get(name)) != (name in now, now.get(name))
    ]


def by_key(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"data": {"file": ""}, "reward.metric": "ndcg@5"} -> {"data.file": "", "reward.metric": "ndcg@5"}."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, dict) and "." not in name
        found |= {f"{name}.{key}": one for key, one in value.items()} if inner else {name: value}
    return found


def _short(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return "not there"
    return short(settings[key])


def short(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
