"""The versions that a replica has in memory, and which of them answers a user.

A changed registry is loaded beside the versions that answer, and then replaces them at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving.api import WrongField
from dpo4rec_ray.serving.loaded_version import LoadedVersion
from dpo4rec_ray.serving.registry import Registry, Routing
from dpo4rec_ray.serving.version_check import load_version
from dpo4rec_ray.serving.version_files import VersionFiles

FIRST_WAIT_S, LAST_WAIT_S = 1.0, 60.0  # before a refused state is tried again


class NotLoaded(WrongField):
    """A request names a version that this replica has not loaded."""

    def __init__(self, model: str, loaded: Iterable[str]):
        super().__init__(f"model {model!r} is not loaded; there are: {', '.join(loaded)}", "model")


@dataclass(frozen=True)
class LoadedVersions:
    """A state of the registry with all its versions in memory. It is replaced as a whole."""

    routing: Routing
    versions: Mapping[str, LoadedVersion]


class VersionManager:
    """Follows a registry. If a new state has a broken version, the state is refused and the old one stays.

    The version before the current one stays loaded. So a rollback loads nothing, and requests can name both.

    Attributes:
        refused: why the newest state of the registry was refused; "" if it was not.
    """

    def __init__(
        self,
        registry: Registry,
        device: str = "cpu",
        prepare: Callable[[VersionFiles], object] = lambda files: None,
    ):
        """
        Args:
            prepare: loads what else a version needs to answer; one for which it raises UserError is broken.

        Raises:
            UserError: no version is promoted, or the current and all previous versions are broken.
        """
        self._registry, self.device, self._prepare = registry, device, prepare
        self._loading = threading.Lock()
        self.refused = ""
        self._broken: Routing | None = None  # the refused state, which is tried again
        self._wait_s, self._try_at = FIRST_WAIT_S, 0.0
        routing = self._promoted()
        self._seen: Routing | None = routing
        try:
            self.loaded = self._load(routing, {})
        except UserError as error:
            self._refuse(routing, error)
            self._seen = None
            self.loaded = self._last_sound(routing, error)

    def refresh(self) -> bool:
        """Load the newest state of the registry. Returns whether there was a new one and it was loaded."""
        with self._loading:
            routing = None
            try:
                routing = self._promoted()
                if routing == self._seen:
                    self.refused = ""
                    return False
                if routing == self._broken and time.monotonic() < self._try_at:
                    return False
                loaded = self._load(routing, self.loaded.versions)
            except UserError as error:
                self._refuse(routing, error)
                return False
            self._seen, self.loaded, self.refused, self._broken = routing, loaded, "", None
            return True

    def _promoted(self) -> Routing:
        """The registry's state. A state without a current version is an error: the folder may be away for a while."""
        routing = self._registry.routing()
        if not routing.current:
            raise UserError(
                f"{self._registry.root}: no version is promoted; run `dpo4rec serve publish` and `promote`"
            )
        return routing

    def _refuse(self, routing: Routing | None, error: UserError) -> None:
        """Note why. The same state is tried again after longer and longer waits, as loading slows the replica down."""
        self._wait_s = min(2 * self._wait_s, LAST_WAIT_S) if routing == self._broken else FIRST_WAIT_S
        self._broken, self._try_at = routing, time.monotonic() + self._wait_s
        self.refused = str(error)

    def _load(self, routing: Routing, loaded: Mapping[str, LoadedVersion]) -> LoadedVersions:
        versions = {name: loaded.get(name) or self._version(name) for name in routing.versions}
        for name in routing.previous[-1:]:
            with contextlib.suppress(UserError):  # no user gets answers from it, so it may be missing
                versions.setdefault(name, loaded.get(name) or self._version(name))
        return LoadedVersions(routing, versions)

    def _version(self, name: str) -> LoadedVersion:
        version = load_version(self._registry.folder(name), self.device)
        self._prepare(version.files)
        return version

    def _last_sound(self, routing: Routing, refused: UserError) -> LoadedVersions:
        """For the start of a replica: the current version alone, or the newest previous version that can be loaded."""
        names = [*routing.previous, routing.current]
        for place in reversed(range(len(names))):
            with contextlib.suppress(UserError):
                return self._load(Routing(current=names[place], previous=tuple(names[:place])), {})
        raise refused

    def version_for(self, user_id: str, model: str | None) -> LoadedVersion:
        """The version `model`, or the one that answers this user.

        A split gives a user the same version every time; without an id, chance decides.

        Raises:
            NotLoaded: `model` is not loaded.
        """
        loaded = self.loaded  # read once: `refresh` may replace it in another thread
        routing = loaded.routing
        if model:
            if model not in loaded.versions:
                raise NotLoaded(model, loaded.versions)
            return loaded.versions[model]
        if routing.split:
            share = share_of(user_id, routing.split) if user_id else random.random()
            if share * 100 < routing.percent:
                return loaded.versions[routing.split]
        return loaded.versions[routing.current]


def share_of(user_id: str, version: str) -> float:
    """A number in [0, 1) for a user, by hash. It differs by version, so each split takes other users."""
    digest = hashlib.blake2b(f"{version}\n{user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
