"""The versions that a replica holds, and who answers whom. Changes are loaded beside what answers now, then swapped."""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving.ranker import Ranker
from dpo4rec_ray.serving.registry import Registry, Traffic, check_version

FIRST_WAIT_S, LAST_WAIT_S = 1.0, 60.0  # until a state that was refused is tried again


class NotLoaded(UserError):
    """A request names a version that this replica does not hold."""


@dataclass(frozen=True)
class Held:
    """A state of the traffic with all its versions loaded; replaced as a whole."""

    traffic: Traffic
    rankers: Mapping[str, Ranker]


class Live:
    """Follows a registry. A version that is broken is refused, and what answered goes on.

    The version before the current one stays loaded, so that a rollback costs no loading and both can be compared.
    """

    def __init__(self, registry: Registry, device: str = "cpu"):
        """Raises UserError if no version is promoted, or none of those promoted so far is sound."""
        self._registry, self._device = registry, device
        self._loading = threading.Lock()
        self.refused = ""  # why the newest state of the registry was not taken over; "" if it was
        self._broken: Traffic | None = None  # the state that was refused, which is tried again
        self._wait_s, self._try_at = FIRST_WAIT_S, 0.0
        traffic = self._promoted()
        self._seen: Traffic | None = traffic
        try:
            self.held = self._load(traffic, {})
        except UserError as error:
            self._refuse(traffic, error)
            self._seen = None
            self.held = self._last_sound(traffic, error)

    def refresh(self) -> bool:
        """Take over a change of the registry, if there is one; whether it was."""
        with self._loading:
            traffic = None
            try:
                traffic = self._promoted()
                if traffic == self._seen:
                    self.refused = ""
                    return False
                if traffic == self._broken and time.monotonic() < self._try_at:
                    return False
                held = self._load(traffic, self.held.rankers)
            except UserError as error:
                self._refuse(traffic, error)
                return False
            self._seen, self.held, self.refused, self._broken = traffic, held, "", None
            return True

    def _promoted(self) -> Traffic:
        """The registry's state. One in which nobody answers is none: the folder may be away for a while."""
        traffic = self._registry.traffic()
        if not traffic.current:
            raise UserError(
                f"{self._registry.root}: no version is promoted; run jobs/serve.py publish and promote"
            )
        return traffic

    def _refuse(self, traffic: Traffic | None, error: UserError) -> None:
        """Say why, and try the same state again after longer and longer times: loading costs those who are answered."""
        self._wait_s = min(2 * self._wait_s, LAST_WAIT_S) if traffic == self._broken else FIRST_WAIT_S
        self._broken, self._try_at = traffic, time.monotonic() + self._wait_s
        self.refused = str(error)

    def _load(self, traffic: Traffic, held: Mapping[str, Ranker]) -> Held:
        rankers = {name: held.get(name) or self._check(name) for name in traffic.versions}
        for name in traffic.previous[-1:]:
            with contextlib.suppress(UserError):  # it answers nobody: no reason to refuse the others
                rankers.setdefault(name, held.get(name) or self._check(name))
        return Held(traffic, rankers)

    def _check(self, name: str) -> Ranker:
        return check_version(self._registry.folder(name), self._device)

    def _last_sound(self, traffic: Traffic, refused: UserError) -> Held:
        """For a replica that starts: the current version without split and shadow, else the newest one that is sound."""
        names = [*traffic.previous, traffic.current]
        for place in reversed(range(len(names))):
            with contextlib.suppress(UserError):
                return self._load(Traffic(current=names[place], previous=tuple(names[:place])), {})
        raise refused

    def ranker(self, user_id: str, model: str | None) -> Ranker:
        """Who answers a user: the same version every time while a split stands; without an id, by chance.

        Raises:
            NotLoaded: `model` is not.
        """
        held = self.held  # once: it may be swapped meanwhile
        traffic = held.traffic
        if model:
            if model not in held.rankers:
                raise NotLoaded(f"model {model!r} is not loaded; there are: {', '.join(held.rankers)}")
            return held.rankers[model]
        if traffic.split:
            share = share_of(user_id, traffic.split) if user_id else random.random()
            if share * 100 < traffic.percent:
                return held.rankers[traffic.split]
        return held.rankers[traffic.current]


def share_of(user_id: str, version: str) -> float:
    """A user's place in [0, 1) under a version's name, so that splits of different versions part users differently."""
    digest = hashlib.blake2b(f"{version}\n{user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
