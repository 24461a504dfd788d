"""The versions that a replica holds, and who answers whom. Changes are loaded beside what answers now, then swapped."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving.ranker import Ranker
from dpo4rec_ray.serving.registry import Registry, Traffic, check_version


@dataclass(frozen=True)
class Held:
    """A state of the traffic with all its versions loaded; replaced as a whole."""

    traffic: Traffic
    rankers: Mapping[str, Ranker]


class Live:
    """Follows a registry. A version that is broken is refused, and what answered goes on."""

    def __init__(self, registry: Registry):
        """Raises UserError if no version is promoted, or the present one is broken."""
        self._registry = registry
        self._loading = threading.Lock()
        self.refused = ""  # why the newest change was not taken over; "" if it was
        traffic = registry.traffic()
        if not traffic.current:
            raise UserError(f"{registry.root}: no version is promoted; run jobs/serve.py publish and promote")
        self._seen = traffic.number
        self.held = Held(traffic, {name: check_version(registry.folder(name)) for name in traffic.versions})

    def refresh(self) -> bool:
        """Take over a change of the registry, if there is one; whether it was."""
        with self._loading:
            try:
                traffic = self._registry.traffic()
                if traffic.number == self._seen:
                    return False
                self._seen = traffic.number
                held = self.held.rankers
                rankers = {
                    name: held.get(name) or check_version(self._registry.folder(name))
                    for name in traffic.versions
                }
            except UserError as error:
                self.refused = str(error)
                return False
            self.held = Held(traffic, rankers)
            self.refused = ""
            return True

    def answers(self, user_id: str, model: str | None) -> str:
        """The version that answers a user: the same every time while a split stands.

        Raises:
            UserError: `model` is not loaded.
        """
        held = self.held
        if model:
            if model not in held.rankers:
                raise UserError(f"model {model!r} is not loaded; there are: {', '.join(held.rankers)}")
            return model
        traffic = held.traffic
        if traffic.split and share_of(user_id, traffic.split) * 100 < traffic.percent:
            return traffic.split
        return traffic.current


def share_of(user_id: str, version: str) -> float:
    """A user's place in [0, 1) under a version's name, so that splits of different versions part users differently."""
    digest = hashlib.blake2b(f"{version}\n{user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
